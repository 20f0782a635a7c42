"""How a judge's grades of the same response agree, for the summary of a verdicts dataset."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from ...schemas.configs import JudgePart
from ...schemas.labels import Order

Grades = list[dict[str, Any]]  # entries of column `grades`, of one response


def summarize_grades(
    rows: Iterable[Grades], judges: Mapping[str, JudgePart]
) -> dict[str, dict[str, Any]]:
    """Per judge: grades and those that are missing; among the repeats in one order the share of
    responses whose grades differ, and their mean range; between the orders the mean difference,
    with the response first minus with the reference first. In units of the value, 0 … 1.
    """
    kept = [row for row in rows if row] if judges else []
    return {
        label: _figures([[one for one in row if one["name"] == label] for row in kept], part)
        for label, part in judges.items()
    }


def _figures(rows: list[Grades], part: JudgePart) -> dict[str, Any]:
    every = [one for row in rows for one in row]
    figures: dict[str, Any] = {
        "given": sum(one["grade"] is not None for one in every),
        "missing": sum(one["grade"] is None for one in every),
    }
    if part.repeats > 1:
        ranges = [
            (max(grades) - min(grades)) / part.highest
            for row in rows
            for _, own in groupby(sorted(row, key=_order), _order)
            if len(grades := [one["grade"] for one in own if one["grade"] is not None]) > 1
        ]
        figures["repeats_differ"] = _mean([float(one > 0) for one in ranges])
        figures["repeats_range"] = _mean(ranges)
    if part.positions == "both":
        gaps = [gap for row in rows if (gap := _gap(row, part.highest)) is not None]
        figures["orders_differ"] = _mean([float(gap != 0) for gap in gaps])
        figures["order_gap"] = _mean(gaps)
    return figures


def _order(entry: dict[str, Any]) -> str:
    return entry["order"]


def _gap(row: Grades, highest: int) -> float | None:
    means = {
        order: _mean([one["grade"] for one in row if one["order"] == order and _given(one)])
        for order in Order
    }
    first, second = means[Order.RESPONSE_FIRST], means[Order.REFERENCE_FIRST]
    return None if first is None or second is None else (first - second) / highest


def _given(entry: dict[str, Any]) -> bool:
    return entry["grade"] is not None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
