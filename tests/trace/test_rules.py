"""Route rules: which tokens each chooses and how many, and the user's own rules."""

import sys
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route, SpanKind
from trace_opd.trace.route import (
    RULES,
    Response,
    load_rule,
    needs_annotations,
    route_tokens,
    rule_source,
)

# Ten tokens in five segments of two; the annotator marked the middle one.
SEGMENTS = np.repeat(np.arange(5), 2)


def response(rollout_id="r", alpha=0.25, spans=((2,),), segments=SEGMENTS, logprobs=None):
    tokens = len(segments)
    return Response(
        rollout_id=rollout_id,
        token_ids=np.arange(tokens),
        logprobs=np.zeros(tokens) if logprobs is None else np.array(logprobs),
        token_segment=segments,
        spans=spans,
        kind=SpanKind.KEY,
        alpha=alpha,
    )


def chosen(rule: str, *args, **kwargs) -> list[int]:
    return np.flatnonzero(RULES[rule](response(*args, **kwargs)) >= 0).tolist()


def test_the_worked_example():
    assert chosen("spans") == [4, 5]
    assert chosen("all") == list(range(10))
    assert len(chosen("random")) == 2
    assert len(chosen("inverted")) == 2


def test_all_ignores_the_cap_and_the_marks():
    assert chosen("all", alpha=0.1, spans=()) == list(range(10))


def test_random_tokens_come_from_the_whole_response_marked_or_not():
    drawn = {token for seed in range(60) for token in chosen("random", f"r{seed}")}
    assert drawn == set(range(10))


def test_inverted_tokens_are_never_marked_and_come_from_all_others():
    drawn = {token for seed in range(60) for token in chosen("inverted", f"r{seed}")}
    assert drawn == {0, 1, 2, 3, 6, 7, 8, 9}


def test_inverted_takes_what_there_is_where_the_marks_leave_less_than_the_cap():
    assert chosen("inverted", alpha=0.5, spans=((0, 1), (2, 3))) == [8, 9]
    assert chosen("inverted", spans=((0, 1, 2, 3, 4),)) == []


@pytest.mark.parametrize("rule", ["random", "inverted"])
def test_a_rollouts_draw_is_the_same_in_every_run_and_its_own(rule):
    draws = [chosen(rule, f"r{seed}") for seed in range(20)]
    assert draws == [chosen(rule, f"r{seed}") for seed in range(20)]
    assert len({tuple(draw) for draw in draws}) > 5


@given(
    st.lists(st.integers(-1, 5), max_size=40),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=4),
    st.floats(0, 1),
    st.sampled_from(["spans", "random", "inverted"]),
)
@settings(deadline=None)
def test_no_capped_rule_exceeds_alpha(segments, spans, alpha, rule):
    given_response = response("r", alpha, spans, np.array(segments, dtype=int))
    span_id = RULES[rule](given_response)
    count = (span_id >= 0).sum()
    assert count <= alpha * len(segments) + 1e-6
    if rule == "random":
        assert count == given_response.room
    if rule == "inverted":
        outside = ~given_response.marked
        assert count == min(given_response.room, outside.sum())
        assert outside[span_id >= 0].all()


@given(
    st.lists(st.integers(-1, 3), max_size=16),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]),
)
@settings(deadline=None, max_examples=300)
def test_spans_are_kept_segment_by_segment_until_the_cap(segments, spans, alpha):
    """The slow twin processes the named segments one by one."""
    given_response = response("r", alpha, spans, np.array(segments, dtype=int))
    expected, kept, full = [-1] * len(segments), 0, False
    for rank, segment in ((rank, segment) for rank, span in enumerate(spans) for segment in span):
        at = [i for i, own in enumerate(segments) if own == segment and expected[i] < 0]
        left = given_response.room - kept
        full = full or len(at) > left
        if full and kept:
            break
        for i in at[:left]:
            expected[i] = rank
        kept += len(at[:left])
    assert RULES["spans"](given_response).tolist() == expected


# --- the user's own rules ---


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module with that text, importable during the test only."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "my_rules.py").write_text(dedent(text))

    yield write
    sys.modules.pop("my_rules", None)


SURPRISING = '''
    import numpy as np


    def surprising(response):
        """Route the tokens that the policy found least likely, as many as the cap lets through."""
        span_id = np.full(response.tokens, -1)
        span_id[np.argsort(response.logprobs, kind="stable")[: response.room]] = 0
        return span_id
'''


def test_a_users_rule_is_one_function_in_one_file(own_module):
    own_module(SURPRISING)
    logprobs = [-0.1, -3.0, -0.2, -0.1, -0.3, -0.1, -5.0, -0.1, -0.2, -0.1]
    routing = route_tokens(
        response(logprobs=logprobs), RoutingConfig(rule="my_rules:surprising", key="rkl")
    )
    assert np.flatnonzero(routing.route == Route.RKL).tolist() == [1, 6]
    assert (routing.coverage, routing.dropped_tokens) == (0.2, 2)


def test_only_a_users_rule_has_its_source_recorded(own_module):
    own_module(SURPRISING)
    assert rule_source("my_rules:surprising") == dedent(SURPRISING)
    assert [rule_source(name) for name in RULES] == [None] * 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("some", "is none of spans, all, random, inverted"),
        (":rule", "write file.py:Class"),
        ("my_rules:", "write file.py:Class"),
        ("no_such_module:rule", "module no_such_module cannot be imported"),
        ("my_rules:other", "module my_rules has no class or function other; it has none"),
        ("my_rules:np.full", "write file.py:Class"),
        ("my_rules:LIMIT", "has no class or function LIMIT"),
    ],
)
def test_a_missing_rule_is_named(own_module, name, sentence):
    own_module("import numpy as np\n\nLIMIT = 3\n")
    with pytest.raises(InputError, match=sentence) as error:
        load_rule(name)
    assert str(error.value).startswith(f"routing.rule {name!r}: ")


@pytest.mark.parametrize(
    "body",
    [
        "np.arange(response.room)",
        "response.marked",
        "np.full(response.tokens, 0.5)",
        "np.full(response.tokens, 40_000)",
        "None",
    ],
    ids=["positions", "a mask", "floats", "too large", "nothing"],
)
def test_other_values_than_a_span_id_per_token_are_refused(own_module, body):
    own_module(f"import numpy as np\n\n\ndef rule(response):\n    return {body}\n")
    with pytest.raises(InputError, match=r"return one integer per token, its span's rank"):
        route_tokens(response(), RoutingConfig(rule="my_rules:rule"))


# --- rules that need the annotator ---


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({}, True),
        ({"key": "none", "error": "none"}, False),
        ({"rule": "all"}, True),  # for the type label
        ({"rule": "all", "teacher_context": "peer"}, False),
        ({"rule": "random", "teacher_context": "solution"}, False),
        ({"rule": "inverted", "teacher_context": "answer"}, True),
        ({"rule": "spans", "teacher_context": "answer"}, True),
        ({"rule": "my_rules:rule", "teacher_context": "answer"}, True),
    ],
)
def test_the_annotator_is_needed_for_spans_and_for_the_type_label(config, needed):
    assert needs_annotations(RoutingConfig(**config)) is needed
