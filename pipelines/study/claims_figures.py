"""The picture of each of a study's claims: a heat map over two axes, or points over one.

figures.py draws it with the others.
"""

from pathlib import Path
from typing import Any

import polars as pl

from ...schemas.configs import AxisConfig, ClaimConfig, StudyConfig
from ...schemas.configs.claims import point_name
from ..plots.differences import DifferencePanel, draw_differences
from ..plots.heat import Axis, HeatPanel, draw_heat
from ..plots.style import styled, write
from ..statistics import Estimate
from .comparisons import OVER_SEEDS, difference, estimate_of, unit_of

_MOST_MAPS, _MOST_PANELS = 3, 4


def plot_claims(config: StudyConfig, comparisons: pl.DataFrame, folder: Path) -> list[Path]:
    """Write `<claim>.svg` for each claim, and return the paths."""
    paths = []
    for name, claim in config.claims.items():
        own = comparisons.filter(claim=name)
        paths.append(folder / f"{name}.svg")
        with styled():
            figure = _map(claim, own) if claim.y is not None else _points(claim, own)
            write(figure, paths[-1])
    return paths


def _map(claim: ClaimConfig, rows: pl.DataFrame) -> Any:
    """A heat map per comparison."""
    assert claim.y is not None
    found = _estimates(claim, rows)[:_MOST_MAPS]
    panels = [
        HeatPanel(
            difference(comparison),
            [[own[point_name(x, y)] for x in claim.x.points] for y in claim.y.points],
            unit_of(comparison.of),
        )
        for comparison, own in zip(claim.comparisons, found, strict=False)
    ]
    return draw_heat(panels, _axis(claim.x), _axis(claim.y), _over(rows))


def _points(claim: ClaimConfig, rows: pl.DataFrame) -> Any:
    """A panel per comparison."""
    found = _estimates(claim, rows)[:_MOST_PANELS]
    panels = [
        DifferencePanel(
            difference(comparison), list(own), list(own.values()), unit_of(comparison.of)
        )
        for comparison, own in zip(claim.comparisons, found, strict=False)
    ]
    return draw_differences(panels, claim.x.label, _over(rows))


def _axis(axis: AxisConfig) -> Axis:
    return Axis(axis.label, list(axis.points))


def _estimates(claim: ClaimConfig, rows: pl.DataFrame) -> list[dict[str, Estimate]]:
    """Of each comparison in the claim's order, by point."""
    each: list[dict[str, Estimate]] = [{} for _ in claim.comparisons]
    for (point,), own in rows.group_by("point", maintain_order=True):
        for place, row in enumerate(own.to_dicts()):
            each[place][str(point)] = estimate_of(row)
    return each


def _over(rows: pl.DataFrame) -> str:
    """What the intervals are over."""
    seeds, problems = rows["seeds"].max(), rows["problems"].max()
    text = f"{seeds} seed{'s' if seeds != 1 else ''}"
    if problems == 1:
        return text
    alone = " and ".join(sorted(set(rows["of"]) & set(OVER_SEEDS)))
    return f"{text} and {problems} problems{f' ({alone}: over seeds)' if alone else ''}"
