"""Distributions of a report: the values of a reward's parts, and a teacher's scores.

overview.py calls it; page.html.j2 draws each as bars in the order of the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc

from ...data.store import Dataset
from ..terminal import visible

Tile = tuple[str, str, str]  # label, value, note

_FEW = 6  # so many distinct values are shown one by one
_NATS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
_SHARES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.5)


@dataclass(frozen=True)
class Distribution:
    """bins: labels with counts, in the order of the values."""

    title: str
    note: str
    bins: list[tuple[str, int]]


@dataclass(frozen=True)
class Distributions:
    tiles: list[Tile] = field(default_factory=list)
    figures: list[Distribution] = field(default_factory=list)


# --- rewards -------------------------------------------------------------------------------------


def of_parts(verdicts: Dataset) -> Distributions:
    """Of the parts of `verify.rewards`, in their order; nothing for verdicts without parts."""
    counts = [one for part in range(verdicts.parts) if (one := _part_values(verdicts, part))]
    if not counts:
        return Distributions()
    found = (
        pl.concat([frame for frames in counts for frame in frames])
        .group_by("name", "value", "status", maintain_order=True)
        .agg(pl.col("len").sum())
    )
    out = Distributions()
    for (name,), rows in found.group_by("name", maintain_order=True):
        held = rows.filter(pl.col("value").is_not_null())
        values, weights = held["value"].to_numpy(), held["len"].to_numpy()
        without = rows.filter(pl.col("value").is_null())
        label = f"reward: {visible(str(name))}"
        mean = f"{np.average(values, weights=weights):.3f}" if len(values) else "–"
        missing = int(without["len"].sum())
        out.tiles.append((label, mean, f"mean value; {missing:,} without"))
        bins = _value_bins(values, weights)
        reasons = without.group_by("status").agg(pl.col("len").sum()).sort("status")
        bins += [(f"none: {status}", int(count)) for status, count in reasons.iter_rows()]
        out.figures.append(Distribution(label, "responses by the part's value", bins))
    return out


def _part_values(verdicts: Dataset, part: int) -> list[pl.DataFrame]:
    """How often each value of each reward part occurs in a table's part; [] without the column."""
    table = verdicts.read_part(part, ["parts"])
    if "parts" not in table.column_names:
        return []
    frame: Any = pl.from_arrow(table)
    return [
        frame.explode("parts")
        .drop_nulls("parts")  # a truncated response has none
        .unnest("parts")
        .group_by("name", "value", "status", maintain_order=True)
        .len()
    ]


def _value_bins(values: np.ndarray, weights: np.ndarray) -> list[tuple[str, int]]:
    distinct = np.unique(values)
    if len(distinct) <= _FEW:
        return [(f"{one:.3g}", int(weights[values == one].sum())) for one in distinct]
    counts, edges = np.histogram(values, 10, (0.0, 1.0), weights=weights)
    return [
        (f"{low:.1f} – {high:.1f}", int(count))
        for (low, high), count in zip(pairwise(edges), counts, strict=True)
    ]


# --- scores --------------------------------------------------------------------------------------

# Column of table scores: title, unit, edges, and the figure of a logarithm.
_SCORES: dict[str, tuple[str, str, tuple[float, ...], Any]] = {
    "logprobs": ("Surprise of the response's token", "nats", _NATS, np.negative),
    "tail_logprobs": ("Probability outside the k likeliest", "share", _SHARES, np.exp),
    "teacher_entropy": ("Teacher's entropy", "nats", _NATS, None),
    "student_entropy": ("Student's entropy", "nats", _NATS, None),
    "divergence": ("KL(student‖teacher)", "nats", _NATS, None),
}


def of_scores(scores: Dataset) -> Distributions:
    """Of a teacher's scores over the routed tokens."""
    counts: dict[str, np.ndarray] = {}
    sums: dict[str, float] = {}
    for name, values in _score_values(scores):
        edges, figure = _SCORES[name][2:]
        held = values if figure is None else figure(values)
        found = np.bincount(np.searchsorted(edges, held, side="right"), minlength=len(edges) + 1)
        counts[name] = counts.get(name, 0) + found
        sums[name] = sums.get(name, 0.0) + float(held.sum())
    summary = scores.summary
    tokens = int(summary.get("scored_tokens") or 0)
    sequences = int(summary.get("sequences") or 0)
    k = summary.get("k")
    note = f"of {sequences:,} sequences" + ("" if k is None else f", {k:,} likeliest each")
    out = Distributions([("scored tokens", f"{tokens:,}", note)])
    for name, found in counts.items():
        title, unit, edges, _ = _SCORES[name]
        mean = sums[name] / max(int(found.sum()), 1)
        out.figures.append(
            Distribution(title, f"routed tokens, {unit}; mean {mean:.3g}", _bins(edges, found))
        )
    return out


def _score_values(scores: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    for part in range(scores.parts):
        table = scores.read_part(part, list(_SCORES))
        for name in table.column_names:
            yield name, pc.list_flatten(table[name]).to_numpy().astype(np.float64)


def _bins(edges: tuple[float, ...], counts: np.ndarray) -> list[tuple[str, int]]:
    labels = [f"below {edges[0]:g}"]
    labels += [f"{low:g} – {high:g}" for low, high in pairwise(edges)]
    labels += [f"from {edges[-1]:g} on"]
    return [(label, int(count)) for label, count in zip(labels, counts, strict=True)]
