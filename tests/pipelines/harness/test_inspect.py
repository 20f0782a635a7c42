"""Inspect's tasks of our problems give the verdicts and the figures of `trace-opd evaluate`.

Run where inspect_ai is installed (extra harness), else skipped.
"""

import math
import re

import pytest
from datasets import config as datasets_config

pytest.importorskip("inspect_ai")

from inspect_ai import eval as inspect_eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    ModelName,
    ModelOutput,
)
from inspect_ai.scorer import CORRECT, INCORRECT, Score
from inspect_ai.solver import TaskState

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.harness.inspect_figures import VERDICT, avg_at, maj_at, pass_at
from trace_opd.pipelines.harness.inspect_tasks import problems, response_text, suite
from trace_opd.pipelines.harness.suites import evaluate_benchmark, make_problems, suite_summary
from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import EvaluateConfig, ProblemsConfig
from trace_opd.schemas.settings import load_config
from trace_opd.tests.pipelines.harness.served import serving_micro
from trace_opd.tests.pipelines.hub_layouts import write_benchmarks

NAMES = ("avg", "pass", "maj")


def run_both(
    folder, monkeypatch, changes: list[str], count: int
) -> tuple[Dataset, EvalLog, list, list]:
    """The evaluate dataset, Inspect's log from the disk, and the requests of each."""
    store = Store(folder / "store")
    source = {"kind": "arithmetic", "min_digits": 2, "max_digits": 6}
    made = run_stage("problems", ProblemsConfig(source=source, limit=count), store, "asked")  # type: ignore[arg-type]
    assert isinstance(made, Dataset)
    small = ["problems=asked", "bootstrap=200", "verify.workers=1", *changes]
    with serving_micro() as (url, asked):
        config = load_config(
            EvaluateConfig, None,
            [f"policy.path={MICRO}",
             f"sampler={{engine: openai, base_url: {url}, api_key_env: null}}", *small],
        )  # fmt: skip
        evaluated = run_stage("evaluate", config, store, "ours")
        assert isinstance(evaluated, Dataset)
        ours, asked[:] = list(asked), []
        monkeypatch.setenv("LOCAL_API_KEY", "none")
        (log,) = inspect_eval(
            problems(set=small, store=str(store.root)),
            model="openai-api/local/micro",
            model_base_url=url,
            log_dir=str(folder / "logs"),
            display="none",
        )
        theirs = list(asked)
    assert log.status == "success"
    return evaluated, read_eval_log(log.location), ours, theirs


@pytest.mark.parametrize(
    ("changes", "k"),
    [
        (["k=1", "sampling={temperature: 0.0, top_p: 1.0, top_k: 0, max_new_tokens: 96}"], 1),
        # Short, so that some responses are truncated.
        (["k=4", "sampling={temperature: 1.0, top_p: 0.9, top_k: 20, max_new_tokens: 56}"], 4),
    ],
)
def test_the_same_verdicts_and_figures_both_ways(tmp_path, monkeypatch, changes, k):
    evaluated, log, ours, theirs = run_both(tmp_path, monkeypatch, changes, 12)
    fields = ("seed", "messages", "temperature", "top_p", "top_k", "max_tokens")
    assert sorted(str([body[name] for name in fields]) for body in ours) == sorted(
        str([body[name] for name in fields]) for body in theirs
    )

    counts: dict[str, list[bool]] = {}
    for sample in log.samples or []:
        value = (sample.scores or {})["answer_verdict"].value
        counts.setdefault(str(sample.id), []).append(value == CORRECT)
    rows = {row["problem_id"]: row for row in evaluated.read().to_pylist()}
    assert {key: sum(marks) for key, marks in counts.items()} == {
        key: row["correct"] for key, row in rows.items()
    }
    assert 0 < sum(row["correct"] for row in rows.values()) < 12 * k

    figures = evaluated.summary["policies"]["base"]
    assert log.results is not None
    found = {score.reducer: score.metrics for score in log.results.scores}
    assert set(found) == {f"{name}_at_{k}" for name in NAMES}
    for name in NAMES:
        metrics = found[f"{name}_at_{k}"]
        values = [round(metrics[end].value, 6) for end in ("mean", "low", "high")]
        wanted = figures[f"{name}@{k}"]
        assert values == [wanted["value"], *wanted["ci95"]]


def test_thinking_reaches_the_server_and_the_log(tmp_path, monkeypatch):
    greedy = "sampling={temperature: 0.0, top_p: 1.0, top_k: 0, max_new_tokens: 8}"
    _, log, ours, theirs = run_both(
        tmp_path, monkeypatch, ["k=1", greedy, "prompt.thinking=false"], 2
    )
    assert log.eval.metadata is not None
    assert log.eval.metadata["thinking"] is False
    for body in (*ours, *theirs):
        assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_verifier_sees_a_response_with_its_thinking():
    thought, answer = "Is it \\boxed{3}?", "So \\boxed{2}."
    content = [ContentReasoning(reasoning=thought), ContentText(text=answer)]
    output = ModelOutput.from_message(ChatMessageAssistant(content=content))
    name = ModelName("openai-api/local/m")
    state = TaskState(name, sample_id="p", epoch=1, input="", messages=[], output=output)
    assert response_text(state) == f"<think>\n{thought}\n</think>\n\n{answer}"


def score(value: str, answer: str | None, judged: bool | None = None, status: str = "ok") -> Score:
    verdict = {
        "rollout_id": f"{value}{answer}{status}", "correct": value == CORRECT, "status": status,
        "parsed_answer": answer, "answer_correct": judged,
    }  # fmt: skip
    return Score(value=value, metadata={VERDICT: verdict})


def test_reducers_follow_the_rules_of_the_stage():
    right, wrong = score(CORRECT, "2"), score(INCORRECT, "3")
    cut = score(INCORRECT, "4/2", True, "truncated")
    unscored = Score.unscored(reason="timeout")

    def reduced(scores: list[Score]) -> list[float]:
        return [float(one(3)(scores).value) for one in (avg_at, pass_at, maj_at)]  # type: ignore

    assert reduced([right, wrong, unscored]) == [0.5, 1.0, 0.5]
    assert reduced([wrong, wrong, right]) == pytest.approx([1 / 3, 1.0, 0.0])
    assert reduced([cut, cut, wrong]) == [0.0, 0.0, 1.0]
    assert all(math.isnan(value) for value in reduced([unscored, unscored]))


def test_a_suite_is_one_task_with_the_mean_of_its_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    write_benchmarks(tmp_path)
    store = Store(tmp_path / "store")
    with serving_micro() as (url, _):
        small = ["k=2", "bootstrap=100", "verify.workers=1", "sampling.max_new_tokens=48"]
        served = f"sampler={{engine: openai, base_url: {url}, api_key_env: null}}"
        config = load_config(EvaluateConfig, None, [f"policy.path={MICRO}", served, *small])
        found = make_problems("paper", store, 2)
        made = {one.preset: evaluate_benchmark(one, config, store, "ours") for one in found}
        ours = suite_summary(config, made)["policies"]["base"]
        monkeypatch.setenv("LOCAL_API_KEY", "none")
        (log,) = inspect_eval(
            suite(set=small, store=str(store.root), limit=2),
            model="openai-api/local/micro",
            model_base_url=url,
            log_dir=str(tmp_path / "logs"),
            display="none",
        )
    assert log.status == "success"
    assert log.results is not None
    for score in log.results.scores:
        figure = str(score.reducer).replace("_at_", "@")
        values = {name: round(metric.value, 6) for name, metric in score.metrics.items()}
        sources = {name: own[figure]["value"] for name, own in ours["sources"].items()}
        low, high = ours[figure]["ci95"]
        assert values == sources | {"mean": ours[figure]["value"], "low": low, "high": high}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda store: suite(store=store), r"math-500, .*: not in store .*evaluate --suite paper"),
        (lambda store: suite("papers", store=store), "--suite 'papers' is unknown"),
        (lambda store: problems("mine", store=store), "dataset 'mine' is not in store"),
        (lambda store: problems(set="kk=3", store=store), "kk: unknown key"),
    ],
)
def test_a_mistake_is_a_sentence_that_inspect_prints_without_a_traceback(make, expected, tmp_path):
    with pytest.raises(PrerequisiteError) as raised:
        make(str(tmp_path))
    assert re.search(expected, str(raised.value.message))
