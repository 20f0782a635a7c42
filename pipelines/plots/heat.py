"""Heat maps of differences over two axes: which points of a map an arm is ahead at.

Each cell has its value and its interval. Colour is for cells whose interval excludes 0; the others
are grey and hatched, so a picture without colour shows the same. The study draws with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import Estimate
from .estimates import Unit, bound, interval, measured, resolved, scaled, signed, unit_name
from .style import EMPTY, INK, MUTED, WIDTH, caption, new_figure, text_height, text_width, wrapped

_VALUE, _INTERVAL, _NAME, _LABEL, _TITLE, _SMALL = 10.5, 6.6, 8.5, 9.5, 10.0, 8.0  # points
_CELL, _PAD = 0.46, 0.07  # inches: height of a cell, and how much wider than its interval it is
_GAP = 0.12  # inches between panels
_MOST_NAME = 1.1  # inches of the names of rows; longer ones have several lines
_HATCH = "#c9c9c4"
# Vermilion and blue, as far as ink can be read on them, with a step at 0: a coloured cell is
# clearly on one side of it.
_SCALE = ((0.0, "#ea8a45"), (0.5, "#fbe6d8"), (0.5, "#dcebf6"), (1.0, "#4f9fd3"))


@dataclass(frozen=True)
class Axis:
    """What changes along an axis, and the names of its points in order."""

    label: str
    points: Sequence[str]


@dataclass(frozen=True)
class HeatPanel:
    """A map of one difference. cells: rows are points of y, the first on top; columns are points
    of x. None, or NaN as value: there is no figure. unit: "points" are shares of one."""

    title: str
    cells: Sequence[Sequence[Estimate | None]]
    unit: Unit = "points"


def draw_heat(panels: Sequence[HeatPanel], x: Axis, y: Axis, over: str = "") -> Any:
    """A figure of the panels, as many next to each other as can be read at a README's width.

    Panels of one unit have the same scale of colours. over: what the intervals are over, as
    "3 seeds and 200 problems"; the caption has it.
    """
    rows_named = [wrapped(point, _MOST_NAME, _NAME) for point in y.points]
    names_end = 0.35 + max(text_width(line, _NAME) for line in "\n".join(rows_named).splitlines())
    columns = _columns(panels, len(x.points), WIDTH - names_end)
    width = (WIDTH - names_end) / columns - _GAP
    titles = [_title(panel, panels, width) for panel in panels]
    columns_named = [wrapped(point, width / len(x.points) - _PAD, _NAME) for point in x.points]
    label = wrapped(x.label, width, _LABEL)
    cell = max(_CELL, text_height(rows_named, _NAME) + 0.06)
    text = wrapped(_caption(panels, over), WIDTH - 0.2, _SMALL)
    rows = -(-len(panels) // columns)
    labelled = 2 if len(panels) % columns else 1  # rows of panels with the label of x
    height = rows * (text_height(titles, _TITLE) + cell * len(y.points) + 0.22)
    height += rows * text_height(columns_named, _NAME) + labelled * (
        text_height([label], _LABEL) + 0.06
    )
    height += text_height([text], _SMALL) + 0.1
    figure, axes = new_figure(rows, columns, height / rows)
    for number, own in enumerate(axes):
        if number >= len(panels):
            own.set_visible(False)
            continue
        panel, first = panels[number], number % columns == 0
        _draw(own, panel, _bound(panels, panel.unit))
        own.set_title(titles[number], fontsize=_TITLE)
        if _mixed(panels):
            own.set_title(unit_name(panel.unit), loc="right", fontsize=_SMALL, color=MUTED,
                          fontweight="normal")  # fmt: skip
        own.set_xticks(range(len(columns_named)), columns_named, fontsize=_NAME)
        own.set_yticks(range(len(rows_named)), rows_named, fontsize=_NAME)
        own.tick_params(labelleft=first)
        if first:
            own.set_ylabel(wrapped(y.label, cell * len(y.points) + 0.1, _LABEL), fontsize=_LABEL)
        if number + columns >= len(panels):
            own.set_xlabel(label, fontsize=_LABEL)
    caption(figure, text)
    return figure


# --- layout --------------------------------------------------------------------------------------


def _columns(panels: Sequence[HeatPanel], cells: int, width: float) -> int:
    """How many panels of so many cells in a row stand next to each other in a width, in inches."""
    texts = [interval(own, panel.unit) for panel in panels for own in _measured(panel)]
    widest = max([text_width(text, _INTERVAL) for text in texts], default=0.0) + _PAD
    return max(1, min(len(panels), int(width / (widest * cells + _GAP))))


def _title(panel: HeatPanel, panels: Sequence[HeatPanel], width: float) -> str:
    unit = text_width(unit_name(panel.unit), _SMALL) + 0.1 if _mixed(panels) else 0.0
    return wrapped(panel.title, width - unit, _TITLE, bold=True)


def _caption(panels: Sequence[HeatPanel], over: str) -> str:
    """What a cell has, and how an unresolved one looks."""
    unit = "" if _mixed(panels) else f" in {unit_name(panels[0].unit)}"
    cells = sum(len(row) for panel in panels for row in panel.cells)
    missing = sum(len(list(_measured(panel))) for panel in panels) < cells
    return (
        f"each cell: the difference{unit}, and below it the 95 % interval"
        f"{f' over {over}' if over else ''}; blue: above 0, orange: below 0, "
        f"grey and hatched: the interval holds 0{', –: not measured' if missing else ''}"
    )


# --- figures -------------------------------------------------------------------------------------


def _mixed(panels: Sequence[HeatPanel]) -> bool:
    return len({panel.unit for panel in panels}) > 1


def _measured(panel: HeatPanel) -> Iterator[Estimate]:
    for row in panel.cells:
        for cell in row:
            if (own := measured(cell)) is not None:
                yield own


def _bound(panels: Sequence[HeatPanel], unit: Unit) -> float:
    """The difference with the strongest colour: the largest of all coloured cells of a unit."""
    same = [panel for panel in panels if panel.unit == unit]
    return bound((own for panel in same for own in _measured(panel) if resolved(own)), unit)


# --- cells ---------------------------------------------------------------------------------------


def _draw(axes: Any, panel: HeatPanel, most: float) -> None:
    """The cells of a panel. most: the difference with the strongest colour, in the unit."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    scale = LinearSegmentedColormap.from_list("difference", _SCALE)
    rows, columns = len(panel.cells), len(panel.cells[0])
    for row, cells in enumerate(panel.cells):
        for column, cell in enumerate(cells):
            own = measured(cell)
            if own is None:
                axes.text(column, row, "–", ha="center", va="center", color=MUTED)
                continue
            corner = (column - 0.5, row - 0.5)
            if resolved(own):
                face = scale(0.5 + 0.5 * scaled(own.value, panel.unit) / most)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=face, linewidth=0))
            else:
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor=EMPTY, edgecolor=_HATCH, hatch="////",
                              linewidth=0)
                )  # fmt: skip
            _write(axes, own, panel.unit, column, row)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks([n - 0.5 for n in range(columns + 1)], minor=True)
    axes.set_yticks([n - 0.5 for n in range(rows + 1)], minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.set_axisbelow(False)  # the grid parts the cells
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write(axes: Any, own: Estimate, unit: Unit, column: int, row: int) -> None:
    """A cell's value and its interval."""
    below, known = interval(own, unit), resolved(own)
    how: dict[str, Any] = {"ha": "center", "va": "center", "color": INK}
    if not known:  # the hatch ends where text begins
        how["bbox"] = {"facecolor": EMPTY, "edgecolor": "none", "pad": 0.8}
    weight = "bold" if known else "normal"
    place = row - 0.15 if below else row
    axes.text(
        column, place, signed(own.value, unit), fontsize=_VALUE, fontweight=weight, **how
    )  # fmt: skip
    if below:
        axes.text(column, row + 0.24, below, fontsize=_INTERVAL, **how)
