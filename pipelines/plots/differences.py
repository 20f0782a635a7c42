"""Differences over one axis: a point and its interval at each place, next to a line at 0.

The study draws with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import Estimate
from .estimates import Unit, measured, resolved, scaled, signed, unit_name
from .style import COLOURS, MUTED, WIDTH, caption, new_figure, text_height, text_width, wrapped

_NAME, _TITLE, _SMALL = 8.5, 10.0, 8.0  # points of type
_AXIS = 0.62  # inches of an axis' numbers and label
_GAP = 0.12  # inches between panels, and between the names of points
_ABOVE, _BELOW = COLOURS[0], COLOURS[1]
_HEIGHT = 1.6  # inches from the lowest interval to the highest one, with room for values
_ROOM = 0.24  # of that: a value's text above or below all intervals


@dataclass(frozen=True)
class DifferencePanel:
    """One difference at each point, in order. None, or NaN as value: there is no figure. unit:
    "points" are shares of one."""

    title: str
    points: Sequence[str]
    estimates: Sequence[Estimate | None]
    unit: Unit = "points"


def draw_differences(panels: Sequence[DifferencePanel], x_label: str, over: str = "") -> Any:
    """A figure of the panels, as many next to each other as can be read at a README's width.

    Those of one unit have the same axis. over: what the intervals are over, as "3 seeds and 200
    problems"; the caption has it.
    """
    columns = _columns(panels)
    rows, width = -(-len(panels) // columns), _width(columns)
    titles = [wrapped(panel.title, width, _TITLE, bold=True) for panel in panels]
    names = [_names(panel, columns) for panel in panels]
    text = wrapped(_caption(panels, over), WIDTH - 0.2, _SMALL)
    height = _HEIGHT + text_height(titles, _TITLE) + 0.25
    height += text_height([name for own in names for name in own], _NAME)
    figure, axes = new_figure(rows, columns, height + 0.4 / rows)
    for number, own in enumerate(axes):
        if number >= len(panels):
            own.set_visible(False)
            continue
        panel = panels[number]
        _draw(own, panel)
        own.set_xticks(range(len(panel.points)), names[number], fontsize=_NAME)
        own.set_title(titles[number], fontsize=_TITLE)
        own.set_ylim(*_limits(panels, panel.unit))
        if number % columns and panels[number - 1].unit == panel.unit:
            own.tick_params(labelleft=False)  # the same axis as its neighbour's
        else:
            own.set_ylabel(unit_name(panel.unit))
        if number + columns >= len(panels):
            own.set_xlabel(wrapped(x_label, width, 9.5))
    caption(figure, text)
    return figure


# --- layout --------------------------------------------------------------------------------------


def _width(columns: int) -> float:
    """Inches of a panel's points if each panel has numbers at its axis."""
    return WIDTH / columns - _AXIS - _GAP


def _columns(panels: Sequence[DifferencePanel]) -> int:
    """The most panels in a row whose names of points and values have room; 1 if none has."""
    most = {1: 1, 3: 3}.get(len(panels), 2)
    return next((n for n in range(most, 1, -1) if all(_fits(one, n) for one in panels)), 1)


def _fits(panel: DifferencePanel, columns: int) -> bool:
    values = [signed(own.value, panel.unit) for own in map(measured, panel.estimates) if own]
    lines = [line for name in _names(panel, columns) for line in name.splitlines()]
    widths = [text_width(text, _NAME, bold=True) for text in values]
    widths += [text_width(line, _NAME) for line in lines]
    return max(widths) <= _space(panel, columns)


def _names(panel: DifferencePanel, columns: int) -> list[str]:
    """The names of the points in lines that have room."""
    return [wrapped(point, _space(panel, columns), _NAME) for point in panel.points]


def _space(panel: DifferencePanel, columns: int) -> float:
    """Inches of a point's name."""
    return _width(columns) / len(panel.points) - _GAP / 2


def _limits(panels: Sequence[DifferencePanel], unit: Unit) -> tuple[float, float]:
    """Ends of the axis of a unit: all intervals of its panels and 0, with room for values."""
    ends = [0.0]
    for panel in panels:
        for own in map(measured, panel.estimates if panel.unit == unit else ()):
            if own is not None:
                ends += [scaled(end, unit) for end in (own.value, own.low, own.high)]
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    room = _ROOM * (high - low) or 1.0
    return low - (room if low < 0 else room / 4), high + (room if high > 0 else room / 4)


def _caption(panels: Sequence[DifferencePanel], over: str) -> str:
    missing = any(measured(own) is None for panel in panels for own in panel.estimates)
    return (
        f"bars: 95 % intervals{f' over {over}' if over else ''}; filled points: the interval "
        f"excludes 0, hollow: it holds 0{', –: not measured' if missing else ''}"
    )


# --- points --------------------------------------------------------------------------------------


def _draw(axes: Any, panel: DifferencePanel) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    for place, estimate in enumerate(panel.estimates):
        own = measured(estimate)
        how: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
        if own is None:
            axes.annotate("–", (place, 0), (0, 4), color=MUTED, **how)
            continue
        value, low, high = (scaled(x, panel.unit) for x in (own.value, own.low, own.high))
        known, above = resolved(own), value >= 0
        colour = MUTED if not known else _ABOVE if above else _BELOW
        axes.plot([place] * 2, [low, high], color=colour, linewidth=1.6, zorder=2)
        axes.plot(
            [place], [value], marker="o", markersize=6, color=colour, zorder=3,
            markerfacecolor=colour if known else "white",
        )  # fmt: skip
        # Next to the end that is further from 0, where no other line is.
        end = value if math.isnan(high - low) else high if above else low
        axes.annotate(
            signed(own.value, panel.unit), (place, end), (0, 5 if above else -5),
            va="bottom" if above else "top", fontsize=_NAME,
            fontweight="bold" if known else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, **how,
        )  # fmt: skip
    axes.set_xlim(-0.5, len(panel.estimates) - 0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
