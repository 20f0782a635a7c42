"""A sampler, an annotator and a source of one's own: the worked example runs, and faults in such
code are sentences. Rewards: verifiers/test_own_reward.py.
"""

import pickle
import shutil
from pathlib import Path

import polars as pl
import pytest

from trace_opd.data import sources
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.cli.ending import exit_code
from trace_opd.pipelines.samplers import sampling_engine
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas import own_code
from trace_opd.schemas.configs import (
    OwnAnnotator,
    OwnSampler,
    OwnSource,
    PolicyConfig,
    SamplingConfig,
    SegmentConfig,
    TrainConfig,
)
from trace_opd.schemas.errors import InputError, OwnCodeError
from trace_opd.schemas.settings import load_config
from trace_opd.trace.protocols import Prompt

HERE = "examples/own-code"
EXAMPLE = Path(__file__).parents[2] / HERE


def table(store: Store, alias: str) -> pl.DataFrame:
    return pl.read_parquet(store.get(alias).glob)


# --- the worked example ---


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The folder of the example, after its pipeline has run."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / HERE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        app(["pipeline", f"{HERE}/config.yaml"], standalone_mode=False)
    return folder


def test_the_worked_example_runs_every_stage_with_code_of_ones_own(example):
    store = Store(example / "store")
    problems = table(store, "own-problems")
    assert problems["source"].unique().to_list() == ["Sums"]
    assert all(int(n) < 500 for text in problems["problem"] for n in text.split("+"))
    verdicts = table(store, "own-verdicts")
    assert set(verdicts["reward"]) == {1.0, 0.25}
    assert set(verdicts["verifier"].str.slice(0, 17)) == {"reward:closeness "}
    annotations = table(store, "own-annotations").explode("spans").unnest("spans", separator="_")
    assert all("c1" in text for text in annotations["spans_text"].drop_nulls())
    assert set(annotations["annotator_name"]) == {"carries"}
    run = store.get("own-train")
    assert set(table(store, run.summary["tables"]["verdicts"])["reward"]) <= {0.0, 1.0, 0.25}
    assert store.get("own-evaluation").summary["policies"].keys() == {"base", "trained"}


def test_an_own_sampler_of_token_ids_samples_rollouts_to_train_on_and_trains(example, monkeypatch):
    monkeypatch.chdir(example)
    changes = [f"sampler.engine={HERE}/sampler.py:Greedy", "group_size=2", "problems=own-problems"]
    app(["rollout", f"{HERE}/config.yaml", *changes, "--alias", "greedy"], standalone_mode=False)
    rows = table(Store("store"), "greedy")
    assert rows["on_policy"].all()
    assert rows["response"].str.contains("boxed").any()
    changes = [f"sampler.engine={HERE}/sampler.py:Greedy", "online.problems=own-problems"]
    changes += ["offline.steps=0", "online.steps=2"]
    app(["train", f"{HERE}/config.yaml", *changes, "--alias", "greedy"], standalone_mode=False)
    assert Store("store").get("greedy").summary["steps"] == 2


def test_a_worker_in_another_folder_loads_the_file_of_the_plan(example, monkeypatch):
    monkeypatch.chdir(example)
    overrides = ["verdicts=own-verdicts", "annotator.options={sign: c0}"]
    stage = REGISTRY["annotate"].load()
    config = stage.config_type
    wanted = load_config(config, f"{HERE}/config.yaml", overrides, "annotate")
    store = Store(example / "store")
    plan, draft = pickle.loads(pickle.dumps(stage.begin(wanted, store)))  # noqa: S301 - our own
    assert isinstance(draft, Draft)
    monkeypatch.chdir("/")
    monkeypatch.setattr(own_code, "_loaded", {})
    assert stage.make_part(plan, draft, 0) == 0
    assert draft.has_part(0)
    plan, draft = pickle.loads(pickle.dumps(stage.begin(plan.config, store)))  # noqa: S301
    file = example / HERE / "annotator.py"
    file.write_text(f"{file.read_text()}\n# changed\n")
    monkeypatch.setattr(own_code, "_loaded", {})
    with pytest.raises(InputError, match="has changed"):
        stage.open(plan, draft)


# --- samplers, annotators, sources that break their protocol ---

PROMPTS = [Prompt([{"role": "user", "content": "1+1"}], [1, 2])]


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("[]", "returned 0 groups for 1 prompts"),
        ("None", "sample returned NoneType, not a list"),
        ("[[Completion(chr(0xd800), 'stop')] * 2]", "half of a surrogate pair"),
        ("[[Completion('a', 'stop', 5)] * 2]", "token_ids is int, not a list"),
        ("[[Completion('a', 'stop', [1], ['a'])] * 2]", "logprobs is no list of numbers"),
        ("[[]]", "prompt 0: returned no list of 2 completions"),
        ("[['text'] * 2]", "returned str, not Completion"),
        ("[[Completion('a', 'eos')] * 2]", "finish_reason is 'eos', not stop or length"),
        ("[[Completion('a', 'stop', [1, 10**6])] * 2]", "token_ids has an entry that is no token"),
        ("[[Completion('a', 'stop', [1], [-1, -2])] * 2]", "logprobs has another length"),
        ("[[Completion('a', 'stop', [1], [0.5])] * 2]", "no natural logarithm"),
        ("[[Completion('a', 'stop', [1], [float('nan')])] * 2]", "no natural logarithm"),
        ("1 / 0", r"own\.py, line 7, in sample: ZeroDivisionError"),
    ],
)
def test_what_a_sampler_returns_is_checked(write, returned, sentence):
    write(
        f"""
        from trace_opd.trace.protocols import Completion


        class S:
            def sample(self, prompts, sampling, seeds):
                return {returned}
        """
    )
    config = OwnSampler(engine="own.py:S")
    sampler, _ = sampling_engine(config, PolicyConfig(path="micro")).open()
    with pytest.raises(InputError, match=sentence) as error:
        sampler.sample(PROMPTS, SamplingConfig(), [[0, 1]])
    assert str(error.value).startswith("sampler.engine own.py:S: ")


def test_a_sampler_that_does_not_follow_the_weights_is_refused_in_training(write, tmp_path):
    write("class S:\n    def sample(self, prompts, sampling, seeds): pass")
    engine = sampling_engine(OwnSampler(engine="own.py:S"), PolicyConfig(path="micro"))
    assert not engine.follows
    overrides = ["online.steps=1", "online.max_staleness=1", "sampler.engine=own.py:S"]
    with pytest.raises(InputError, match="max_staleness is 1 but"):
        load_config(TrainConfig, None, overrides)
    write("class S: pass")
    with pytest.raises(InputError, match=r"has no method sample\(prompts, sampling, seeds\)"):
        sampling_engine(OwnSampler(engine="own.py:S"), PolicyConfig(path="micro"))


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("[]", "returned 0 readings for 1 responses"),
        ("None", "annotate returned NoneType, not a list"),
        ("[Reading('skipped')]", "skipped is for responses without a verdict"),
        ("[Reading('ok', [0], 'setup')]", r"marked is \[0\], not a list of spans"),
        ("[Reading('ok', [[True]], 'setup')]", "not a list of spans"),
        ("[Reading('ok', [[0.7]], 'setup')]", "not a list of spans"),
        ("[Reading('ok', ['0'], 'setup')]", "not a list of spans"),
        ("[Reading('empty', None)]", "marked is None, not a list of spans"),
        ("[Reading('failed', error=ValueError('x'))]", "error is ValueError.*, not text"),
        ("[Reading('failed', error=chr(0xd800))]", "error is .*, not text"),
        ("['ok']", "rollout r0-0: returned str, not a Reading"),
        ("[Reading('fine')]", "'fine' is not a valid AnnotationStatus"),
        ("[Reading('ok', [[0]], 'odd')]", "'odd' is not a valid DiagnosticType; known: .*setup"),
        ("[Reading('ok', [[99]], 'setup')]", r"marks segment 99, the response has 0 … \d"),
        ("[Reading('ok', [[-1]], 'setup')]", "marks segment -1"),
        ("[Reading('ok', [[]], 'setup')]", "a span names no segment"),
        ("[Reading('ok', [[0]])]", "needs spans and a type"),
        ("[Reading('ok')]", "needs spans and a type"),
        ("[Reading('empty', [[0]], 'setup')]", "any other status has none"),
    ],
)
def test_what_an_annotator_returns_is_checked(write, make_verdicts, tmp_path, returned, sentence):
    write(
        f"""
        from trace_opd.pipelines.annotators.rows import Reading


        class A:
            def annotate(self, items):
                return {returned}
        """
    )
    tables = annotate_inputs(make_verdicts(tmp_path / "store", 1, 1))
    annotator = open_annotator(OwnAnnotator(engine="own.py:A"), SegmentConfig())
    with pytest.raises(InputError, match=sentence) as error:
        annotator.annotate(*tables)
    assert str(error.value).startswith("annotator.engine own.py:A: ")


def annotate_inputs(store: Store):
    verdicts: Dataset = store.get("verdicts")
    made = verdicts.input("rollouts")
    return made.input("problems").read(), made.read(), verdicts.read()


def test_unscored_responses_are_not_shown_to_an_annotator(write, make_verdicts, tmp_path):
    write(
        """
        from trace_opd.pipelines.annotators.rows import Reading

        class A:
            def annotate(self, items):
                for item in items:
                    assert item.correct is not None
                    yield Reading("empty")
        """
    )
    tables = annotate_inputs(make_verdicts(tmp_path / "store", 1, 3, unscored=1))
    made = open_annotator(OwnAnnotator(engine="own.py:A"), SegmentConfig()).annotate(*tables)
    assert made["status"].to_pylist() == ["empty", "empty", "skipped"]


GOOD = '{"problem": "1+1", "answer": "2"}'


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("", "yielded no row"),
        (f"{GOOD}, 3", "row 1: is int, not a dict"),
        ('{"problem": "1+1"}', "row 0: answer is not text, or is empty"),
        ('{"problem": " ", "answer": "2"}', "row 0: problem is not text, or is empty"),
        ('{"problem": "1+1", "answer": 2}', "row 0: answer is not text"),
        (f'{GOOD} | {{"gold": 1}}', "row 0: has the unknown key 'gold'"),
        (f'{GOOD} | {{"answer_kind": "code"}}', "answer_kind is none of math, choice, text"),
        (f'{GOOD} | {{"problem": chr(0xd800)}}', "row 0: problem is not text"),
        (f'{GOOD} | {{"steps": 5}}', "steps is neither a list nor None"),
        (f'{GOOD} | {{"solution": 3}}', "solution is neither text nor None"),
        (f'{GOOD} | {{"level": 3}}', "level is neither text nor None"),
        (f'{GOOD} | {{"steps": [{{"text": "a"}}]}}', "a step is no dict of text, value, type"),
        ("1 / 0", r"own\.py, line 4, in rows: ZeroDivisionError"),
    ],
)
def test_what_a_source_yields_is_checked(write, rows, sentence):
    write(f"class S:\n    def rows(self, seed):\n\n        yield from [{rows}]\n")
    with pytest.raises(InputError, match=sentence) as error:
        list(sources.rows(OwnSource(kind="own.py:S"), 0))
    assert str(error.value).startswith("source.kind own.py:S: ")


def list_rows(source):
    sources.identity(source)
    return list(sources.rows(source, 0))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def rows(self): pass", r"rows: too many .*; it is called as rows\(seed\)"),
        ("def rows(self, seed, size): pass", "rows: missing a required argument: 'size'"),
        ("async def rows(self, seed): pass", "rows is async"),
        ("async def rows(self, seed): yield 1", "rows is async"),
        ("def rows(self, seed): pass", "rows returned NoneType, not a list"),
        ("def rows(self, seed): pass\n    def identity(self): return {1}", "no JSON data"),
    ],
)
def test_a_method_of_another_form_is_one_sentence(write, text, sentence):
    write(f"class S:\n    {text}\n")
    with pytest.raises(InputError, match=sentence) as error:
        list_rows(OwnSource(kind="own.py:S"))
    assert str(error.value).startswith("source.kind own.py:S: ")


@pytest.mark.parametrize("text", ["self, seed", "self, *given", "self, seed, size=1"])
def test_a_method_may_take_more_than_it_is_called_with(write, text):
    write(f"class S:\n    def rows({text}): return [{GOOD}]\n")
    assert len(list_rows(OwnSource(kind="own.py:S"))) == 1


def test_a_static_or_class_method_is_called_as_any(write):
    write(
        f"""
        class S:
            @staticmethod
            def rows(seed): return [{GOOD}]
            @classmethod
            def identity(cls): return 1
        """
    )
    assert len(list_rows(OwnSource(kind="own.py:S"))) == 1


def test_what_a_source_reads_is_part_of_its_identity(write):
    write(
        """
        class S:
            def rows(self, seed): pass
            def identity(self): return {"hash": open("data").read()}
        """
    )
    Path("data").write_text("one")
    first = sources.identity(OwnSource(kind="own.py:S"))
    Path("data").write_text("two")
    assert sources.identity(OwnSource(kind="own.py:S")) != first
    assert not sources.is_endless(OwnSource(kind="own.py:S"))


# --- the command line ---


@pytest.mark.parametrize(
    ("text", "code"),
    [("class S: pass", 2), ("class S:\n    def rows(self, seed):\n        1 / 0", 1)],
)
def test_a_fault_is_a_sentence_and_an_exit_code(write, capsys, text, code):
    write(text)
    command = ["problems", "source={kind: 'own.py:S'}"]
    assert exit_code(lambda: app(command, standalone_mode=False)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("trace-opd: source.kind own.py:S: ")
    assert "Traceback" not in printed
    assert issubclass(OwnCodeError, InputError)
