"""Lines over optimiser steps, each labelled where it ends.

A few lines have bands. The bands of many would hide each other: these have a bar each, right of the
last step. training.py and the study draw with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .style import INK, darker, new_figure, percent, spread, style_of, whole_steps

_LABEL = 8.5  # points
_GAP = 1.25  # of a label's height from one label to the next
_MOST_BANDS = 4  # lines of a panel
_MOST_DOTS = 12  # points of a line that are marked
_BAR = 0.016  # of the axes' width from one bar to the next


@dataclass(frozen=True)
class Line:
    """steps, values, low, high: (points,), NaN where there is nothing; low, high None: no band."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """A title, the unit of its axis, and lines. share: values are shares of one."""

    title: str
    unit: str
    lines: Sequence[Line]
    share: bool = False


def draw_panels(panels: Sequence[Panel], xlabel: str = "optimiser steps") -> Any:
    """A figure of one panel, its lines labelled at their ends; or of several with one legend."""
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, 3.6 if columns == 1 else 2.7)
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    for panel, own in zip(panels, axes, strict=False):
        for line in panel.lines:
            draw_line(own, line, labels.index(line.label), has_bands(panel.lines))
        finish_axes(own, panel.title, panel.unit, panel.share)
    for number, own in enumerate(axes):
        if number >= len(panels):
            own.set_visible(False)
        elif number + columns >= len(panels):  # the lowest of its column
            own.set_xlabel(xlabel)
    if len(panels) == 1:
        label_ends(figure, axes[0], panels[0].lines, labels)
    elif len(labels) > 1:
        shared_legend(figure, labels)
    return figure


def has_bands(lines: Sequence[Line]) -> bool:
    """Whether a panel's intervals are bands; else they are bars right of the last step."""
    return len(lines) <= _MOST_BANDS


def draw_line(axes: Any, line: Line, index: int, band: bool = True) -> None:
    """A line, a dot at each of a few points, and its band."""
    style = style_of(index)
    known = np.isfinite(line.values)
    dots = {"marker": "o", "markersize": 3.2} if known.sum() <= _MOST_DOTS else {}
    axes.plot(line.steps[known], line.values[known], **style, **dots, clip_on=False, zorder=3)
    if not band and line.low is not None and line.high is not None and known.any():
        last = np.flatnonzero(known)[-1]  # where the bar goes
        axes.update_datalim([(line.steps[last], end[last]) for end in (line.low, line.high)])
    if band and line.low is not None and line.high is not None:
        axes.fill_between(
            line.steps, line.low, line.high, color=style["color"], alpha=0.13, linewidth=0
        )


def finish_axes(axes: Any, title: str, unit: str, share: bool) -> None:
    """Title, axis labels and limits: the lines go from one edge to the other."""
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.margins(x=0, y=0.06)
    whole_steps(axes.xaxis)
    if share:
        percent(axes.yaxis)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.005), min(high, 1.005))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def label_ends(figure: Any, axes: Any, lines: Sequence[Line], labels: Sequence[str]) -> None:
    """Name each line right of its end; names that would overlap are moved apart."""
    ends = [
        (line, float(line.values[np.flatnonzero(np.isfinite(line.values))[-1]]))
        for line in lines
        if np.isfinite(line.values).any()
    ]
    if not ends:
        return
    figure.draw_without_rendering()  # the axes get their height
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height * 72 / figure.dpi
    wanted = [(value - low) / (high - low) for _, value in ends]
    places = spread(wanted, _LABEL * _GAP / points, 0.0, 1.0)
    start = 1.0 if has_bands(lines) else _draw_bars(axes, ends, labels)
    for (line, _), at, place in zip(ends, wanted, places, strict=True):
        style = style_of(labels.index(line.label))
        axes.plot(
            [start + 0.006, start + 0.03], [at, place], transform=axes.transAxes, clip_on=False,
            linewidth=0.8, **style,
        )  # fmt: skip
        axes.text(
            start + 0.037, place, line.label, transform=axes.transAxes, va="center",
            fontsize=_LABEL, color=darker(style["color"]),
        )  # fmt: skip
    for _ in range(3):  # the labels' place depends on the width that they leave
        figure.draw_without_rendering()


def _draw_bars(axes: Any, ends: Sequence[tuple[Line, float]], labels: Sequence[str]) -> float:
    """The interval of each line's end, the highest first; where the bars end."""
    from matplotlib.transforms import blended_transform_factory

    next_to = blended_transform_factory(axes.transAxes, axes.transData)
    in_order = sorted(ends, key=lambda end: -end[1])
    for number, (line, value) in enumerate(in_order):
        if line.low is None or line.high is None:
            continue
        place = 1.0 + _BAR * (number + 1)
        last = np.flatnonzero(np.isfinite(line.values))[-1]
        colour = style_of(labels.index(line.label))["color"]
        how = {"transform": next_to, "clip_on": False, "color": colour}
        axes.plot([place] * 2, [line.low[last], line.high[last]], linewidth=1.6, **how)
        axes.plot([place], [value], marker="o", markersize=3.2, **how)
    return 1.0 + _BAR * (len(ends) + 0.5)


def shared_legend(figure: Any, labels: Sequence[str]) -> None:
    """One legend above all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style_of(n)) for n, label in enumerate(labels)]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(labels), 4), fontsize=_LABEL,
        labelcolor=INK, handlelength=2.2, columnspacing=1.6,
    )  # fmt: skip
