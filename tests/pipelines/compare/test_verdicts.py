"""Command compare on verdicts: counts and figures by hand, intervals, the page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.compare.verdicts import (
    COUNTS,
    compare_verdicts,
    figures,
    overall_rows,
    verdicts_table,
)
from trace_opd.schemas.contract import validate
from trace_opd.schemas.results import VERDICT_COMPARISONS
from trace_opd.schemas.tables import VERDICTS

from .test_compare import dataset, run, written

Right = bool | None


def judged(
    store: Store, rollouts: Dataset, name: str, right: Sequence[Right], parts: Sequence = ()
) -> Dataset:
    """A second verdicts dataset of the same rollouts."""
    rows = []
    for index, (row, correct) in enumerate(zip(rollouts.read().to_pylist(), right, strict=True)):
        ids = {key: row[key] for key in ("rollout_id", "problem_id", "group_id")}
        made = ids | {
            "reward": None if correct is None else float(correct), "correct": correct,
            "parsed_answer": None, "status": "ok" if correct is not None else "failed",
            "verifier": name, "seconds": 0.0,
        }  # fmt: skip
        rows.append(made | ({"parts": parts[index]} if parts else {}))
    made = dataset(store, "verify", VERDICTS, rows, {"rollouts": rollouts}, name, parts=2)
    store.set_alias(name, made)
    return made


EXACT = [True, True, False, False, True, False, True, None]
JUDGE = [True, False, False, True, True, None, True, None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Eight rollouts of four problems, judged twice."""
    store = Store(tmp_path / "store")
    texts = [(f"response {index}", True) for index in range(8)]
    rollouts = written(store, texts, "a <b>problem</b>").input("rollouts")
    judged(store, rollouts, "exact", EXACT)
    judged(store, rollouts, "judge", JUDGE)
    return store


def test_counts_by_both_and_figures_by_hand(store):
    (row,) = overall_rows(verdicts_table(compare_verdicts(["exact", "judge"], store)))
    assert {name: row[name] for name in COUNTS} == {
        "only_reference": 1, "only_other": 0, "neither": 1, "both_right": 3, "both_wrong": 1,
        "reference_right": 1, "other_right": 1,
    }  # fmt: skip
    assert (row["rollouts"], row["problems"]) == (8, 4)
    assert row["accuracy"] == pytest.approx(4 / 6)
    assert row["right_accuracy"] == pytest.approx(3 / 4)
    assert row["wrong_accuracy"] == pytest.approx(1 / 2)
    # p_o 4/6; p_e = (4/6)(4/6) + (2/6)(2/6) = 5/9
    assert row["kappa"] == pytest.approx((4 / 6 - 5 / 9) / (1 - 5 / 9))
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_the_other_way_round_the_counts_change_sides(store):
    (row,) = overall_rows(verdicts_table(compare_verdicts(["exact", "judge"], store, "judge")))
    assert (row["reference"], row["only_reference"], row["only_other"]) == ("judge", 0, 1)
    assert row["kappa"] == pytest.approx(0.25)


def test_figures_are_undefined_where_nothing_can_disagree():
    one = dict.fromkeys(COUNTS, 0)
    cases = [one, one | {"both_right": 3}, one | {"neither": 2}]
    found = figures(np.array([list(case.values()) for case in cases]))
    assert np.isnan(found["kappa"]).all()
    assert np.isnan(found["accuracy"][[0, 2]]).all()
    assert found["accuracy"][1] == found["right_accuracy"][1] == 1
    assert np.isnan(found["wrong_accuracy"]).all()


def test_intervals_are_the_percentiles_of_resampled_problems(store):
    comparison = compare_verdicts(["exact", "judge"], store)
    (row,) = overall_rows(verdicts_table(comparison, resamples=400, seed=3))
    sums = comparison.pairs[0].sums
    rng = np.random.default_rng(3)
    drawn = [figures(sums[rng.integers(0, 4, 4)].sum(axis=0)) for _ in range(400)]
    for name in ("accuracy", "kappa", "right_accuracy"):
        values = np.array([one[name] for one in drawn])
        low, high = np.nanquantile(values, [0.025, 0.975])
        assert row[f"{name}_low"] == pytest.approx(low)
        assert row[f"{name}_high"] == pytest.approx(high)


def test_the_parts_of_one_dataset_are_compared_from_a_threshold_on(store):
    values = [(1.0, 0.9), (1.0, 0.7), (0.0, 0.2), (0.0, None), (1.0, 1.0), (0.0, 0.7), (1.0, 0.1)]
    parts = [
        [{"name": "math", "value": exact, "status": "ok", "seconds": 0.0},
         {"name": "judge", "value": grade, "status": "ok", "seconds": 0.0}]
        for exact, grade in values
    ] + [[]]  # fmt: skip
    rollouts = store.get("exact").input("rollouts")
    judged(store, rollouts, "both", [True] * 8, parts)
    comparison = compare_verdicts(["both"], store, correct_at=0.7)
    (row,) = overall_rows(verdicts_table(comparison))
    assert (row["reference"], row["other"], row["correct_at"]) == ("math", "judge", 0.7)
    assert {name: row[name] for name in COUNTS} == {
        "only_reference": 1, "only_other": 0, "neither": 1, "both_right": 3, "both_wrong": 1,
        "reference_right": 1, "other_right": 1,
    }  # fmt: skip
    (strict,) = overall_rows(verdicts_table(compare_verdicts(["both"], store)))
    assert (strict["correct_at"], strict["both_right"]) == (1.0, 1)


def test_the_command_writes_a_table_and_a_page_and_prints_both(store, tmp_path, capsys):
    folder = tmp_path / "out"
    root = store.root
    assert run("compare", "exact", "judge", "--store", root, "--output", folder) == 0
    printed = capsys.readouterr().out
    assert "8 rollouts of 4 problems in common" in printed
    assert "judge against exact" in printed
    for text in ("unscored by both", "κ", "0.250 (", "unscored"):
        assert text in printed
    table = validate(pq.read_table(folder / "comparisons.parquet"), VERDICT_COMPARISONS)
    assert len(table) == 1 + 4
    page = (folder / "compare.html").read_text()
    assert "0.250" in page
    assert "a &lt;b&gt;problem" in page
    assert "default-src 'none'" in page
    assert run("compare", "exact", "judge", "--store", root) == 0
    assert list((Path(root) / "compare").rglob("compare.html"))


@pytest.mark.parametrize(
    ("names", "more", "why"),
    [
        (["exact"], [], "has fewer than two parts of rewards"),
        (["exact", "exact"], [], "give each verdicts dataset once"),
        (["exact", "judge"], ["--reference", "x"], "--reference x: is none of exact, judge"),
        (["exact", "judge"], ["--correct-at", "0.5"], "--correct-at: is for the parts of one"),
        (["exact", "verdicts-of-others"], [], "have no rollout in common"),
        (["exact", "rollout/{rollouts}"], [], "holds rollouts, this stage needs table verdicts"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(store, capsys, names, more, why):
    rollouts = store.get("exact").input("rollouts")
    rows = [store.get("exact").read().to_pylist()[0] | {"rollout_id": "z"}]
    other = dataset(store, "verify", VERDICTS, rows, {"rollouts": rollouts}, "z")
    store.set_alias("verdicts-of-others", other)
    names = [name.format(rollouts=rollouts.id) for name in names]
    assert run("compare", *names, *more, "--store", store.root) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert why in sentence
