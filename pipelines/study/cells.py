"""Cells and tables of a study's page. page.py and claims_page.py write with it."""

import math
from collections.abc import Iterable, Sequence

from ...schemas.configs import WorldConfig
from ..statistics import Estimate

# Of the figures of a base (base_figures.py).
LABELS = ("right_label", "wrong_label")
PLACES = ("key", "error", "elsewhere")


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    header = ("| " + " | ".join(names) + " |").replace("|  |", "| |")
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "|" + "---|" * len(names), *lines])


def dials(world: WorldConfig) -> str:
    """The dials of a world that differ from the defaults."""
    defaults = WorldConfig()
    set_here = [
        f"{field} {value}" if isinstance(value, str) else f"{field} {value:g}"
        for field, value in world.model_dump().items()
        if value != getattr(defaults, field)
    ]
    return ", ".join(set_here) or "the defaults"


def percent(value: object) -> str:
    return "–" if _unknown(value) else f"{value:.1%}".replace("%", " %")


def number(value: object, places: int, sign: str = "") -> str:
    return "–" if _unknown(value) else f"{value:{sign}.{places}f}"


def _unknown(value: object) -> bool:
    return not isinstance(value, float) or math.isnan(value)


def interval(estimate: Estimate) -> str:
    """A pass rate and its 95 % interval."""
    if math.isnan(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def points(estimate: Estimate) -> str:
    """A difference of pass rates and its 95 % interval, in percentage points."""
    return difference(estimate, 100, 1)


def difference(estimate: Estimate, scale: float, places: int) -> str:
    """A difference and its 95 % interval if it has one, times a scale."""
    if math.isnan(estimate.value):
        return "–"
    ends = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    value, low, high = (f"{x:+.{places}f}" for x in ends)
    return value if math.isnan(estimate.low) else f"{value} ({low} to {high})"
