"""A comparison as a table (schemas/results.py): figures per problem, and in all with intervals.

`trace-opd compare` calls it; page.py writes and shows the table.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from ...schemas.results import COMPARISONS
from .agreement import COUNTS, OWN, SHARED, figures, intervals
from .compare import SCOPES, Comparison, Pair
from .marks import TYPES

_ROLLOUTS = ("judged", "only_reference", "only_other", "neither", "asked_differently")
_SIDES = ("reference", "other")


def comparison_table(comparison: Comparison, resamples: int = 1000, seed: int = 0) -> pa.Table:
    """COMPARISONS: for each pair and scope the overall row, then a row per problem with rollouts.

    resamples: number of bootstrap resamples of problems for each interval.
    """
    tables = [
        table
        for pair in comparison.pairs
        for scope in range(len(SCOPES))
        for table in (
            _overall(comparison, pair, scope, resamples, seed),
            _by_problem(comparison, pair, scope),
        )
    ]
    return pa.concat_tables(tables)


def _overall(comparison: Comparison, pair: Pair, scope: int, resamples: int, seed: int) -> pa.Table:
    sums = pair.sums[scope]
    held = _rollouts(sums) > 0
    columns = _columns(sums.sum(axis=0, keepdims=True))
    between = intervals(sums[held][:, : len(SHARED)], resamples, seed)
    for name, ends in between.items():
        for end, value in zip(("low", "high"), ends, strict=True):
            columns[f"{name}_{end}"] = np.array([value])
    columns["problems"] = np.array([held.sum()])
    columns["confusion"] = [_type_pairs(pair.types[scope])]
    return _table(comparison, pair, scope, [None], columns)


def _by_problem(comparison: Comparison, pair: Pair, scope: int) -> pa.Table:
    held = np.flatnonzero(_rollouts(pair.sums[scope]) > 0)
    columns = _columns(pair.sums[scope][held])
    columns["problems"] = np.ones(len(held), dtype=np.int64)
    return _table(
        comparison, pair, scope, [comparison.problem_ids[index] for index in held], columns
    )


def _columns(sums: np.ndarray) -> dict[str, Any]:
    """Counts and figures from rows of summed COUNTS, (rows,) each."""
    counts = dict(zip(COUNTS, sums.T, strict=True))
    columns: dict[str, Any] = {name: counts[name] for name in SHARED}
    columns["rollouts"] = _rollouts(sums)
    columns |= figures(counts)
    for side in _SIDES:
        own = {name: counts[f"{side}.{name}"] for name in OWN}
        with np.errstate(invalid="ignore"):  # 0 / 0 if this annotator answered nothing
            own["coverage"] = own.pop("marked") / own["units"]
            own["capped_coverage"] = own.pop("kept") / own.pop("units")
        columns |= {f"{side}_{name}": values for name, values in own.items()}
    return columns


def _rollouts(sums: np.ndarray) -> np.ndarray:
    return sums[:, [COUNTS.index(name) for name in _ROLLOUTS]].sum(axis=1)


def _type_pairs(types: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"reference_type": TYPES[row], "other_type": TYPES[column], "rollouts": int(count)}
        for (row, column), count in np.ndenumerate(types)
        if count
    ]


def _table(
    comparison: Comparison,
    pair: Pair,
    scope: int,
    problem_ids: list[Any],
    columns: dict[str, Any],
) -> pa.Table:
    """A table of the contract; missing columns and NaN become null."""
    rows = len(problem_ids)
    datasets = [comparison.datasets[name].ref for name in (pair.reference, pair.other)]
    same: dict[str, Any] = {
        "reference": pair.reference,
        "other": pair.other,
        "reference_dataset": datasets[0],
        "other_dataset": datasets[1],
        "kind": SCOPES[scope],
        "unit": comparison.unit,
        "alpha": comparison.alpha,
    }
    columns = columns | {name: [value] * rows for name, value in same.items()}
    columns["problem_id"] = problem_ids
    columns["comparison_id"] = [
        ":".join([*datasets, SCOPES[scope], problem or "overall"]) for problem in problem_ids
    ]
    arrays = [
        _array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(rows, field.type)
        for field in COMPARISONS.schema
    ]
    return pa.Table.from_arrays(arrays, schema=COMPARISONS.schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return pa.array(values, kind)
    return pa.array(values, mask=np.isnan(values)).cast(kind)
