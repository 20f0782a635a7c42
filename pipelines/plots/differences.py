"""Differences over one axis: a point and its interval at each place, next to a line at 0.

The study draws with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import Estimate
from .estimates import Unit, measured, resolved, scaled, signed, unit_name
from .style import COLOURS, MUTED, WIDTH, caption, new_figure, text_width, wrapped

_LABEL, _TITLE = 8.5, 10.0  # points of type
_ABOVE, _BELOW = COLOURS[0], COLOURS[1]
_MOST_COLUMNS = 2


@dataclass(frozen=True)
class DifferencePanel:
    """One difference at each point, in order. None, or NaN as value: there is no figure. unit:
    "points" are shares of one."""

    title: str
    points: Sequence[str]
    estimates: Sequence[Estimate | None]
    unit: Unit = "points"


def draw_differences(panels: Sequence[DifferencePanel], x_label: str, over: str = "") -> Any:
    """A figure of the panels, those of one unit with the same axis.

    over: what the intervals are over, as "3 seeds and 200 problems"; the caption ends with it.
    """
    columns = min(len(panels), _MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, 2.7)
    width = (WIDTH - 0.7 * columns) / columns
    for number, own in enumerate(axes):
        if number >= len(panels):
            own.set_visible(False)
            continue
        panel = panels[number]
        _draw(own, panel, width)
        own.set_ylim(*_limits(panels, panel.unit))
        if number + columns >= len(panels):
            own.set_xlabel(x_label)
    caption(figure, wrapped(_caption(panels, over), WIDTH - 0.2, 8))
    return figure


def _draw(axes: Any, panel: DifferencePanel, width: float) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    for place, estimate in enumerate(panel.estimates):
        own = measured(estimate)
        if own is None:
            axes.annotate(
                "–", (place, 0), (0, 4), textcoords="offset points", ha="center", color=MUTED
            )
            continue
        value, low, high = (scaled(x, panel.unit) for x in (own.value, own.low, own.high))
        known = resolved(own)
        colour = MUTED if not known else _ABOVE if value > 0 else _BELOW
        axes.plot([place] * 2, [low, high], color=colour, linewidth=1.6, zorder=2)
        axes.plot(
            [place], [value], marker="o", markersize=6, color=colour, zorder=3,
            markerfacecolor=colour if known else "white",
        )  # fmt: skip
        axes.annotate(
            signed(own.value, panel.unit), (place, value), (6, 0), textcoords="offset points",
            va="center", fontsize=_LABEL, fontweight="bold" if known else "normal",
        )  # fmt: skip
    space = width / len(panel.points) - 0.06
    labels = [wrapped(point, space, _LABEL) for point in panel.points]
    tilted = any(text_width(line, _LABEL) > space for name in labels for line in name.splitlines())
    how = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    axes.set_xticks(range(len(labels)), panel.points if tilted else labels, fontsize=_LABEL, **how)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_title(wrapped(panel.title, width, _TITLE, bold=True), fontsize=_TITLE)
    axes.set_ylabel(unit_name(panel.unit))
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _limits(panels: Sequence[DifferencePanel], unit: Unit) -> tuple[float, float]:
    """Ends of the axis of a unit: all intervals of its panels and 0, with a margin."""
    ends = [0.0]
    for panel in panels:
        for own in map(measured, panel.estimates if panel.unit == unit else ()):
            if own is not None:
                ends += [scaled(end, unit) for end in (own.value, own.low, own.high)]
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _caption(panels: Sequence[DifferencePanel], over: str) -> str:
    missing = any(measured(own) is None for panel in panels for own in panel.estimates)
    return (
        f"bars: 95 % intervals{f' over {over}' if over else ''}; filled: the interval excludes 0, "
        f"hollow: it holds 0{'; –: not measured' if missing else ''}"
    )
