"""Foreign chat templates render under limits, and their text equals transformers'."""

from collections.abc import Iterator
from copy import deepcopy

import pytest

from trace_opd.pipelines.bundled.micro import CHAT_TEMPLATE
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.errors import InputError
from trace_opd.trace import chat_template
from trace_opd.trace.chat_template import render_template
from trace_opd.trace.policy import load_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief. ✓"}, {"role": "user", "content": "1+1?\ud800"}]


@pytest.fixture(scope="module")
def micro():
    return load_tokenizer(str(MICRO))


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """A worker gets its limit when it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "_CPU_S", 1)
        chat_template._WORKER.close()
        yield
    chat_template._WORKER.close()


@pytest.fixture
def with_template(micro):
    def make(template):
        tokenizer = deepcopy(micro)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "fails (OverflowError: Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "runs for more than"),
        ("{% if '7' in messages[0]['content'] %}{{ 2 ** (10 ** 9) }}{% endif %}",
         "runs for more than"),
        ("{{ 'x' * 10**10 }}", "needs too much memory"),
        ("{{ 'x' * 10**7 }}", "makes 10,000,000 characters"),
        ("{% for i in range(4000) %}{{ 'x' * 10**6 }}{% endfor %}", "needs too much memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails (RecursionError"),
        ("{{ raise_exception('only\n\x1b[31m tools') }}", "fails (TemplateError: only"),
        ("{{ messages[0].nothing.more }}", "fails (UndefinedError"),
        ("{{ cycler.__init__.__globals__ }}", "fails (SecurityError"),
        ("{% if %}", "fails (TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "fails (TypeError"),
        ({"tool_use": "x", "rag": "y"}, "is not found"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_template_that_fails_or_exceeds_a_limit_is_refused(with_template, template, what):
    tokenizer = with_template(template)
    messages = [{"role": "user", "content": "7"}]
    with pytest.raises(InputError) as refused:
        render_template(tokenizer, messages, {})
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    # The next conversation is rendered by the same worker or by a new one.
    ordinary = with_template("{{ messages[0].content }}!")
    assert render_template(ordinary, messages, {}) == "7!"


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_a_worker_renders_what_transformers_renders(with_template, options):
    tokenizer = with_template(
        CHAT_TEMPLATE + "{{ eos_token }}{% if enable_thinking is defined %}T{% endif %}{{ tools }}"
    )
    ours = render_template(tokenizer, MESSAGES, options)
    theirs = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **options
    )
    assert ours == theirs


def test_a_bundled_models_template_starts_no_worker(micro):
    chat_template._WORKER.close()
    assert "1+1?" in render_template(micro, MESSAGES, {})
    assert chat_template._WORKER._process is None


def test_a_killed_worker_is_started_again(with_template):
    tokenizer = with_template("{{ messages[0].content }}!")
    render_template(tokenizer, MESSAGES, {})
    process = chat_template._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert render_template(tokenizer, MESSAGES, {}) == "Be brief. ✓!"


def test_a_worker_ends_when_its_pipe_is_closed(with_template):
    render_template(with_template("x"), MESSAGES, {})
    worker = chat_template._WORKER
    assert worker._process is not None
    assert worker._connection is not None
    worker._connection.close()  # as the kernel does for a killed parent
    assert worker._process.wait(20) == 0
    worker._process = worker._connection = None
