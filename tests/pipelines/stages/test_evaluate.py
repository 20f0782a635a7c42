"""Figures of an evaluation: pass@k, majority votes, intervals, the paired difference."""

from contextlib import closing
from itertools import combinations
from math import comb

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from trace_opd.data.store import Draft, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.stages.base import Plan
from trace_opd.pipelines.stages.evaluate import (
    BASE,
    TRAINED,
    evaluation_rows,
    majority_correct,
    summarize,
    verdicts_of_answers,
)
from trace_opd.pipelines.statistics import Estimate, bootstrap_mean, pass_at_k
from trace_opd.pipelines.verifiers.registry import open_verifier
from trace_opd.schemas.configs import EvaluateConfig, VerifyConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.results import EVALUATIONS
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS

# --- pass@k ---


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(samples):
    for k in range(1, samples + 1):
        for correct in range(samples + 1):
            marks = [True] * correct + [False] * (samples - correct)
            subsets = list(combinations(marks, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(np.array([samples]), np.array([correct]), k)[0] == pytest.approx(
                expected
            )


def test_pass_at_k_in_closed_form():
    correct = np.arange(9)
    assert pass_at_k(np.full(9, 8), correct, 1).tolist() == pytest.approx((correct / 8).tolist())
    assert pass_at_k(np.full(9, 8), correct, 8).tolist() == [0.0] + [1.0] * 8
    expected = [1 - comb(8 - c, 4) / comb(8, 4) for c in range(9)]
    assert pass_at_k(np.full(9, 8), correct, 4).tolist() == pytest.approx(expected)


# --- majority ---


def verdict(parsed: str | None, correct: bool, status: str = "ok") -> dict:
    return {"parsed_answer": parsed, "correct": correct, "status": status, "rollout_id": parsed}


RIGHT, OTHER_RIGHT = verdict("1/2", True), verdict("0.5", True)
CUT_RIGHT, CUT_ALSO, CUT_WRONG, CUT_SILENT = (
    verdict(answer, False, "truncated") for answer in ("1/2", "2/4", "2", None)
)
JUDGED = {"1/2": True, "2/4": True, "2": False}  # the answers of truncated responses
WRONG, OTHER_WRONG, SILENT = verdict("2", False), verdict("3", False), verdict(None, False)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([RIGHT, RIGHT, WRONG], 1.0),
        ([WRONG, WRONG, RIGHT], 0.0),
        ([RIGHT, WRONG], 0.5),
        ([RIGHT, WRONG, OTHER_WRONG], 1 / 3),
        ([WRONG, OTHER_WRONG], 0.0),
        ([RIGHT, RIGHT, WRONG, WRONG, OTHER_WRONG], 0.5),
        # Two ways to write the right answer are one vote's worth each for the same answer.
        ([RIGHT, OTHER_RIGHT, WRONG, OTHER_WRONG], 1.0),
        # White space around a wrong answer does not split its votes.
        ([WRONG, verdict(" 2 ", False), RIGHT], 0.0),
        # A sample without an answer does not vote.
        ([SILENT, SILENT, SILENT, RIGHT], 1.0),
        ([SILENT, SILENT], 0.0),
        ([CUT_SILENT, CUT_SILENT, RIGHT], 1.0),
        # A truncated one votes for the answer found in it, right or wrong.
        ([CUT_WRONG, CUT_WRONG, RIGHT], 0.0),
        ([CUT_WRONG, WRONG, RIGHT], 0.0),
        ([CUT_RIGHT, CUT_ALSO, WRONG], 1.0),
        ([CUT_RIGHT, WRONG], 0.5),
        ([CUT_WRONG, CUT_RIGHT, CUT_ALSO], 1.0),
        ([], None),
    ],
)
def test_the_majority_answer_by_hand(verdicts, expected):
    found = majority_correct(verdicts, JUDGED)
    assert found == (None if expected is None else pytest.approx(expected))


def test_without_a_judge_a_truncated_answer_is_right_if_a_right_response_has_its_text():
    assert majority_correct([CUT_RIGHT, CUT_RIGHT, WRONG]) == 0.0  # "1/2" is right by no verdict
    assert majority_correct([CUT_RIGHT, RIGHT, WRONG]) == 1.0
    assert majority_correct([CUT_ALSO, RIGHT]) == 0.5


# --- bootstrap ---


def test_the_95_percent_interval_covers_the_truth_about_that_often():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = rng.binomial(8, 0.4, size=60) / 8
        estimate = bootstrap_mean(values, np.zeros(60), 400, trial)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_intervals_width_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(size=400)
    estimate = bootstrap_mean(values, np.zeros(400), 4000, 0)
    standard_error = values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_a_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=40)
    first, again, other = (bootstrap_mean(values, np.zeros(40), 500, s) for s in (3, 3, 4))
    assert first == again != other


def test_sources_weigh_the_same_whatever_their_size():
    values = np.array([1.0] * 30 + [0.0] * 470)
    sources = np.array(["small"] * 30 + ["large"] * 470)
    assert bootstrap_mean(values, sources, 200, 0) == Estimate(0.5, 0.5, 0.5)


def test_problems_are_resampled_within_their_source():
    # Mixing the sources would make the interval as wide as their difference.
    values = np.array([0.0, 0.1] * 50 + [9.0, 9.1] * 50)
    sources = np.array(["a"] * 100 + ["b"] * 100)
    estimate = bootstrap_mean(values, sources, 1000, 0)
    assert estimate.value == pytest.approx(4.55)
    assert estimate.high - estimate.low < 0.03


def test_the_memory_bound_does_not_change_the_figures():
    # 30,000 problems make chunks of 133 resamples.
    values = np.random.default_rng(2).normal(size=30_000)
    estimate = bootstrap_mean(values, np.zeros(30_000), 300, 0)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 173.2, rel=0.15)


# --- rows ---


def evaluated(samples: dict[str, list[dict]]) -> pa.Table:
    """evaluation_rows of problems by id; a sample: reward, parsed, tokens, finish."""
    problems, rollouts, verdicts = [], [], []
    for problem_id, own in samples.items():
        problems.append(
            {"problem_id": problem_id, "problem": "1+1", "answer": "2", "answer_kind": "math",
             "source": "s", "split": "test"}
        )  # fmt: skip
        for index, sample in enumerate(own):
            ids = {"rollout_id": f"{problem_id}{index}", "problem_id": problem_id, "group_id": "g"}
            rollouts.append(
                ids | {"sample_index": index, "prompt_token_ids": [1],
                "token_ids": [2] * sample["tokens"], "logprobs": [-1.0] * sample["tokens"],
                "response": sample.get("response", ""),
                "finish_reason": sample.get("finish", "stop"),
                "policy_name": "micro", "policy_revision": "r", "policy_step": 0,
                "vocab_fingerprint": "v", "temperature": 0.6, "top_p": 0.95, "top_k": 20,
                "max_new_tokens": 64, "seed": index, "on_policy": True}
            )  # fmt: skip
            reward = sample["reward"]
            verdicts.append(
                ids | {"reward": reward, "correct": None if reward is None else reward > 0,
                "parsed_answer": sample.get("parsed"), "status": sample.get("status", "ok"),
                "verifier": "t",
                "seconds": 0.0}
            )  # fmt: skip
    tables = PROBLEMS.table(problems), ROLLOUTS.table(rollouts), VERDICTS.table(verdicts)
    return evaluation_rows("base", *tables, seed=0)


def test_a_problems_row_counts_its_samples():
    table = evaluated(
        {
            "p": [
                {"reward": 1.0, "parsed": "2", "tokens": 10},
                {"reward": 0.0, "parsed": "3", "tokens": 20},
                {"reward": 0.0, "tokens": 64, "finish": "length"},
                {"reward": None, "tokens": 6},
            ]
        }
    )
    validate(table, EVALUATIONS)
    (row,) = table.to_pylist()
    assert (row["policy"], row["policy_name"], row["source"]) == ("base", "micro", "s")
    assert (row["k"], row["correct"], row["unscored"], row["truncated"]) == (3, 1, 1, 1)
    assert (row["majority_correct"], row["mean_tokens"]) == (0.5, 25.0)


def test_a_problems_row_without_data_is_null_not_0():
    unscored = {"reward": None, "status": "timeout", "tokens": 3}
    (row,) = evaluated({"p": [unscored, unscored]}).to_pylist()
    assert (row["k"], row["majority_correct"], row["mean_tokens"]) == (0, None, 3.0)
    # A server's text whose token ids are unknown.
    (row,) = evaluated({"p": [unscored | {"tokens": 0, "response": "2"}, unscored]}).to_pylist()
    assert row["mean_tokens"] is None


def test_a_truncated_sample_votes_for_its_answer_and_is_wrong_in_the_count():
    cut = {"reward": 0.0, "parsed": "3", "tokens": 64, "finish": "length", "status": "truncated"}
    (row,) = evaluated({"p": [cut, cut, {"reward": 1.0, "parsed": "2", "tokens": 9}]}).to_pylist()
    assert (row["k"], row["correct"], row["majority_correct"]) == (3, 1, 0.0)


@pytest.mark.parametrize(
    ("truncated", "expected"), [("zero", {"r0": True, "r1": False}), ("mask", {})]
)
def test_the_verifier_says_which_answers_of_truncated_responses_are_right(truncated, expected):
    texts = ["so \\boxed{4/2}. Or is", "so \\boxed{3}. Or is", "so it is", "so \\boxed{2}."]
    problems = PROBLEMS.table(
        [{"problem_id": "p", "problem": "1+1", "answer": "2", "answer_kind": "math", "source": "s",
          "split": "test"}]
    )  # fmt: skip
    rollouts = pa.table(
        {
            "rollout_id": [f"r{index}" for index in range(4)],
            "problem_id": ["p"] * 4,
            "group_id": ["g"] * 4,
            "response": texts,
            "finish_reason": ["length", "length", "length", "stop"],
        }
    )
    config = VerifyConfig(workers=1, truncated=truncated)
    with closing(open_verifier(config)) as verifier:
        verdicts = verifier.verify(problems, rollouts)
        found = verdicts_of_answers(config, verifier, problems, rollouts, verdicts)
    assert found == expected


def test_rows_come_in_the_problems_order_with_ids_of_their_own():
    sample = {"reward": 1.0, "parsed": "2", "tokens": 1}
    table = evaluated({"q": [sample], "p": [sample, sample]})
    assert table["problem_id"].to_pylist() == ["q", "p"]
    assert table["k"].to_pylist() == [1, 2]
    assert len(set(table["evaluation_id"].to_pylist())) == 2


# --- summary ---


def summary(
    base: list, trained: list | None = None, sources: list[str] | None = None, k: int = 8
) -> dict:
    """Of problems with so many right ones among k samples each; None: no sample was scored."""
    rows = [
        {
            "evaluation_id": f"{role}{i}", "problem_id": f"p{i:03}",
            "source": sources[i] if sources else "s", "policy": role, "policy_name": role,
            "policy_revision": "r", "k": k if c is not None else 0, "correct": c or 0,
            "majority_correct": None if c is None else float(2 * c > k), "mean_tokens": 1.0,
            "truncated": 0, "unscored": 0,
        }
        for role, counts in ((BASE, base), (TRAINED, trained or []))
        for i, c in enumerate(counts)
    ]  # fmt: skip
    plan = Plan(EvaluateConfig(k=k, bootstrap=500), {}, {}, 1)
    return summarize(plan, iter([EVALUATIONS.table(rows[:1]), EVALUATIONS.table(rows[1:])]))


def test_figures_of_a_policy_by_hand():
    out = summary([0, 4, 8, 2])
    figures = out["policies"][BASE]
    assert (out["k"], figures["problems"]) == (8, 4)
    assert figures["avg@8"]["value"] == pytest.approx(14 / 32)
    assert figures["pass@8"]["value"] == 0.75
    assert figures["maj@8"]["value"] == 0.25
    expected = np.mean([0, 1 - 1 / 70, 1, 1 - 15 / 70])
    assert figures["pass@4"]["value"] == pytest.approx(expected, abs=1e-6)
    low, high = figures["avg@8"]["ci95"]
    assert 0 <= low < 14 / 32 < high <= 1
    assert "paired_difference" not in out


def test_the_figure_over_sources_is_the_unweighted_mean_of_theirs():
    out = summary([8, 0, 0, 0], sources=["a", "b", "b", "b"])["policies"][BASE]
    assert out["sources"]["a"]["avg@8"]["value"] == 1.0
    assert out["sources"]["b"]["avg@8"]["value"] == 0.0
    assert out["avg@8"]["value"] == 0.5


def test_the_difference_is_paired_per_problem():
    # Problems differ widely, each by the same gain: the pairing takes their spread out.
    base = [0, 7, 2, 5, 1, 6, 3, 4]
    out = summary(base, [c + 1 for c in base])
    assert out["paired_difference"]["avg@8"] == {"value": 0.125, "ci95": [0.125, 0.125]}
    unpaired = out["policies"][TRAINED]["avg@8"]["ci95"]
    assert unpaired[1] - unpaired[0] > 0.2


def test_equal_policies_have_a_difference_of_0():
    for figure in summary([1, 5, 3], [1, 5, 3])["paired_difference"].values():
        assert figure == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_problems_that_one_policy_has_no_scored_sample_of_are_not_paired():
    out = summary([None, 8, 2, 4], [8, None, 3, 5])
    assert out["policies"][BASE]["problems"] == 3
    assert out["paired_difference"]["avg@8"] == {"value": 0.125, "ci95": [0.125, 0.125]}


NULL = {"value": None, "ci95": None}


def test_a_policy_or_source_of_which_nothing_was_scored_has_null_figures():
    out = summary([None, None, None, None], sources=["a", "a", "b", "b"], k=4)["policies"][BASE]
    names = ["avg@4", "pass@4", "maj@4", "pass@2"]
    assert [out[name] for name in names] == [NULL] * 4
    assert out["sources"] == {source: dict.fromkeys(names, NULL) for source in ("a", "b")}
    out = summary([4, 0, None, None], sources=["a", "a", "b", "b"], k=4)["policies"][BASE]
    assert out["avg@4"]["value"] == out["sources"]["a"]["avg@4"]["value"] == 0.5
    assert out["sources"]["b"]["avg@4"] == NULL
    for base, trained in (([8, 4], [None, None]), ([8, None], [None, 4])):
        out = summary(base, trained)
        assert out["policies"][BASE]["avg@8"] != NULL
        assert set(map(str, out["paired_difference"].values())) == {str(NULL)}


def test_wrong_answers_are_0_and_not_null():
    assert summary([0, 0])["policies"][BASE]["avg@8"] == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_a_shown_evaluation_has_a_dash_where_nothing_was_scored(tmp_path, capsys, monkeypatch):
    shown = show(tmp_path, capsys, monkeypatch, summary([None, None], [8, 4]))
    assert next(line for line in shown if "avg@8" in line).split() == [
        "avg@8", "–", "75.0%", "(50.0%", "–", "100.0%)", "–",
    ]  # fmt: skip


def test_a_shown_evaluation_has_a_column_per_policy_and_the_paired_difference(
    tmp_path, capsys, monkeypatch
):
    shown = show(tmp_path, capsys, monkeypatch, summary([0, 4, 8, 4], [4, 8, 8, 4]))
    (line,) = (line for line in shown if "avg@8" in line)
    assert [cell for cell in line.split() if "%" in cell][::3] == ["50.0%", "75.0%", "25.0%"]


def show(tmp_path, capsys, monkeypatch, figures: dict) -> list[str]:
    """The lines that `trace-opd show` prints of an evaluation."""
    store = Store(tmp_path)
    draft = store.begin("evaluate", {}, {}, EVALUATIONS)
    assert isinstance(draft, Draft)
    dataset = draft.finish(0, figures)
    command = ["trace-opd", "show", dataset.id, "--store", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("trace_opd.pipelines.cli.commands.console", Console(width=120))
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out.splitlines()
