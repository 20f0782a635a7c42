"""Agreement of verdicts on the same rollouts: of datasets, or of the parts of one dataset.

`trace-opd compare` calls `compare_verdicts` and `verdicts_table`; verdicts_page.py writes and shows
the table. So a judge is measured against exact verdicts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Store
from ...schemas.errors import InputError
from ...schemas.results import VERDICT_COMPARISONS
from ...schemas.tables import VERDICTS
from ..statistics import percentiles, resampled
from .agreement import cohen_kappa
from .marks import places

# Counts of rollouts; the last four are of those that both judge.
COUNTS = (
    "only_reference", "only_other", "neither", "both_right", "both_wrong", "reference_right",
    "other_right",
)  # fmt: skip
FIGURES = ("accuracy", "kappa", "right_accuracy", "wrong_accuracy")


@dataclass(frozen=True)
class Pair:
    """sums: (problems, COUNTS) int64."""

    reference: str
    other: str
    sums: np.ndarray


@dataclass(frozen=True)
class VerdictComparison:
    """Every pair, the reference first.

    datasets: by name of what judges; common: rollouts in all of them; problem_ids: (problems,);
    correct_at: least value of a part that counts as right, None where datasets are compared; right:
    (judges, common) float, 1 right, 0 wrong, NaN unscored.
    """

    datasets: dict[str, Dataset]
    common: int
    problem_ids: list[str]
    correct_at: float | None
    right: dict[str, np.ndarray]
    pairs: list[Pair]

    @property
    def reference(self) -> str:
        return next(iter(self.datasets))


def compare_verdicts(
    names: Sequence[str],
    store: Store,
    reference: str | None = None,
    correct_at: float | None = None,
) -> VerdictComparison:
    """Count the agreement of every pair.

    names: verdicts datasets; one alone: its parts are compared. reference: the dataset or part that
    the others are measured against, None: the first. correct_at: of parts; None: the dataset's own.

    Raises:
        InputError: nothing to compare, no rollout in common, an unknown reference.
    """
    if len(set(names)) < len(names):
        raise InputError("compare: give each verdicts dataset once")
    datasets = {name: store.get(name, VERDICTS) for name in names}
    if len(names) == 1:
        datasets, tables, correct_at = _parts(names[0], datasets[names[0]], correct_at)
    else:
        if correct_at is not None:
            raise InputError(
                "--correct-at: is for the parts of one dataset; each dataset has its own verdicts"
            )
        tables = {name: _read(dataset) for name, dataset in datasets.items()}
    lead = reference or next(iter(datasets))
    if lead not in datasets:
        raise InputError(f"--reference {lead}: is none of {', '.join(datasets)}")
    order = dict.fromkeys([lead, *datasets])
    first = tables[lead]
    rows = np.stack([places(first["rollout_id"], tables[name]["rollout_id"]) for name in order])
    rows = rows[:, (rows >= 0).all(axis=0)]
    if not rows.shape[1]:
        raise InputError(
            f"{', '.join(order)}: have no rollout in common; verify the same rollouts with each"
        )
    right = {
        name: tables[name]["right"].to_numpy()[taken]
        for name, taken in zip(order, rows, strict=True)
    }
    coded = first["problem_id"].take(pa.array(rows[0])).combine_chunks().dictionary_encode()
    problem_ids: list[Any] = coded.dictionary.to_pylist()
    problem = coded.indices.to_numpy()
    return VerdictComparison(
        {name: datasets[name] for name in order},
        rows.shape[1],
        problem_ids,
        correct_at,
        right,
        [
            Pair(*two, _sums(right[two[0]], right[two[1]], problem, len(problem_ids)))
            for two in combinations(order, 2)
        ],
    )


def _read(dataset: Dataset) -> pa.Table:
    """Columns rollout_id, problem_id, right."""
    table = dataset.read(["rollout_id", "problem_id", "correct"])
    right = table["correct"].cast(pa.float64()).to_numpy()  # NaN where null
    return table.select(["rollout_id", "problem_id"]).append_column("right", pa.array(right))


def _parts(
    name: str, dataset: Dataset, correct_at: float | None
) -> tuple[dict[str, Dataset], dict[str, pa.Table], float]:
    """The parts of one dataset as if each were a dataset."""
    found: dict[str, np.ndarray] = {}
    ids = dataset.read(["rollout_id", "problem_id"])
    for row, parts in enumerate(_part_values(dataset)):
        for part in parts or []:
            values = found.setdefault(part["name"], np.full(len(ids), np.nan))
            values[row] = np.nan if part["value"] is None else part["value"]
    if len(found) < 2:
        raise InputError(
            f"{name}: has fewer than two parts of rewards; give two or more verdicts datasets, or "
            "one of `verify.rewards` with several parts"
        )
    least = dataset.manifest["config"].get("correct_at", 1.0) if correct_at is None else correct_at
    tables = {}
    for part, values in found.items():
        reached = (values.astype(np.float32) >= np.float32(least)).astype(float)  # as stored
        right = np.where(np.isnan(values), np.nan, reached)
        tables[part] = ids.append_column("right", pa.array(right))
    return dict.fromkeys(found, dataset), tables, float(least)


def _part_values(dataset: Dataset) -> Iterator[list[dict[str, Any]] | None]:
    """The parts of each row; none where the dataset has no such column."""
    for number in range(dataset.parts):
        table = dataset.read_part(number)
        if "parts" in table.column_names:
            yield from table["parts"].to_pylist()


def _sums(first: np.ndarray, second: np.ndarray, problem: np.ndarray, problems: int) -> np.ndarray:
    """COUNTS by problem. first, second: (common,) float."""
    known = ~np.isnan(first), ~np.isnan(second)
    both = known[0] & known[1]
    counts = [
        known[0] & ~known[1],
        known[1] & ~known[0],
        ~known[0] & ~known[1],
        both & (first == 1) & (second == 1),
        both & (first == 0) & (second == 0),
        both & (first == 1) & (second == 0),
        both & (first == 0) & (second == 1),
    ]
    sums = np.zeros((problems, len(COUNTS)), np.int64)
    np.add.at(sums, problem, np.stack(counts, axis=1).astype(np.int64))
    return sums


def figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """FIGURES of summed COUNTS (…, COUNTS), NaN where undefined.

    accuracy: share of equal verdicts; kappa: Cohen's; right_accuracy: of the responses that are
    right by the reference, the share that the other calls right; wrong_accuracy: of the wrong ones,
    wrong.
    """
    c = dict(zip(COUNTS, np.moveaxis(sums.astype(float), -1, 0), strict=True))
    right, wrong = c["both_right"] + c["reference_right"], c["both_wrong"] + c["other_right"]
    scored = right + wrong
    return {
        "accuracy": _share(c["both_right"] + c["both_wrong"], scored),
        "kappa": cohen_kappa(scored, right, c["both_right"] + c["other_right"], c["both_right"]),
        "right_accuracy": _share(c["both_right"], right),
        "wrong_accuracy": _share(c["both_wrong"], wrong),
    }


def verdicts_table(comparison: VerdictComparison, resamples: int = 1000, seed: int = 0) -> pa.Table:
    """VERDICT_COMPARISONS: for each pair the overall row, then a row per problem.

    resamples: bootstrap resamples of problems, which are drawn because the responses to one problem
    are alike.
    """
    tables = []
    for pair in comparison.pairs:
        overall = figures(pair.sums.sum(axis=0, keepdims=True))
        ends = _intervals(pair.sums, resamples, seed)
        tables += [
            _table(comparison, pair, [None], pair.sums.sum(axis=0, keepdims=True), overall, ends),
            _table(comparison, pair, comparison.problem_ids, pair.sums, figures(pair.sums), {}),
        ]
    return pa.concat_tables(tables)


def _intervals(sums: np.ndarray, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    problems = len(sums)
    if problems < 2:
        return {}

    def drawn_sums(index: np.ndarray) -> np.ndarray:
        weights = np.stack([np.bincount(drawn, minlength=problems) for drawn in index])
        return weights.astype(float) @ sums

    drawn = resampled(drawn_sums, [problems], resamples, np.random.default_rng(seed))
    return {name: percentiles(values) for name, values in figures(drawn).items()}


def _table(
    comparison: VerdictComparison,
    pair: Pair,
    problem_ids: Sequence[Any],
    sums: np.ndarray,
    found: dict[str, np.ndarray],
    ends: dict[str, tuple[float, float]],
) -> pa.Table:
    rows = len(problem_ids)
    refs = [comparison.datasets[name].ref for name in (pair.reference, pair.other)]
    same = {
        "reference": pair.reference,
        "other": pair.other,
        "reference_dataset": refs[0],
        "other_dataset": refs[1],
        "correct_at": comparison.correct_at,
    }
    columns: dict[str, Any] = {name: [value] * rows for name, value in same.items()}
    names = [*refs, pair.reference, pair.other]
    columns["comparison_id"] = [":".join([*names, id or "overall"]) for id in problem_ids]
    columns["problem_id"] = list(problem_ids)
    columns["problems"] = [1 if id else len(comparison.problem_ids) for id in problem_ids]
    columns["rollouts"] = sums.sum(axis=1)
    columns |= dict(zip(COUNTS, sums.T, strict=True))
    for name, values in found.items():
        columns[name] = _nullable(values)
        for end, at in (("low", 0), ("high", 1)):
            value = ends[name][at] if name in ends else np.nan
            columns[f"{name}_{end}"] = _nullable(np.full(rows, value))
    return (
        pa.table(columns).select(VERDICT_COMPARISONS.schema.names).cast(VERDICT_COMPARISONS.schema)
    )


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _share(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(part, total, out=np.full(np.shape(total), np.nan), where=total != 0)


def overall_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The overall row of each pair."""
    return table.filter(pc.is_null(table["problem_id"])).to_pylist()
