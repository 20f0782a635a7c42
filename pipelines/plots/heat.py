"""Heat maps of differences over two axes: which points of a map an arm is ahead at.

Each cell has its value and its interval. Colour is for cells whose interval excludes 0; the others
are grey and hatched, so a picture without colour shows the same. The study draws with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import Estimate
from .estimates import Unit, bound, interval, measured, resolved, scaled, signed, unit_name
from .style import EMPTY, INK, MUTED, WIDTH, caption, new_figure, text_width, wrapped

_VALUE, _INTERVAL, _LABEL, _TITLE = 10.5, 7.0, 8.5, 10.0  # points of type
_CELL = 0.46  # inches, height
_PAD = 0.1  # inches that a cell is wider than its interval
_GAP = 0.12  # inches between panels
_MOST_NAME = 1.1  # inches of the names of rows; longer ones have several lines
_HATCH = "#c9c9c4"
# Vermilion and blue, with a step at 0: a coloured cell is on one side of it.
_SCALE = ((0.0, "#D55E00"), (0.5, "#fbe3d3"), (0.5, "#d6e8f4"), (1.0, "#0072B2"))


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
    "3 seeds and 200 problems"; the caption ends with it.
    """
    names = [wrapped(point, _MOST_NAME, _LABEL) for point in y.points]
    left = 0.35 + max(text_width(line, _LABEL) for name in names for line in name.splitlines())
    widest = max((text_width(text, _INTERVAL) for text in _intervals(panels)), default=0.5) + _PAD
    columns = max(1, min(len(panels), int((WIDTH - left) / (widest * len(x.points) + _GAP))))
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)  # as even as can be
    figure, axes = new_figure(rows, columns, 0.85 + _CELL * len(y.points))
    width = (WIDTH - left) / columns - _GAP
    for number, own in enumerate(axes):
        if number >= len(panels):
            own.set_visible(False)
            continue
        panel = panels[number]
        _draw(own, panel, _bound(panels, panel.unit), len(x.points))
        own.set_title(wrapped(panel.title, width, _TITLE, bold=True), fontsize=_TITLE)
        own.set_xticks(
            range(len(x.points)),
            [wrapped(point, width / len(x.points) - 0.04, _LABEL) for point in x.points],
            fontsize=_LABEL,
        )
        first = number % columns == 0
        own.set_yticks(range(len(names)), names if first else [""] * len(names), fontsize=_LABEL)
        if first:
            own.set_ylabel(y.label)
        if number + columns >= len(panels):
            own.set_xlabel(wrapped(x.label, width, 9.5))
    caption(figure, wrapped(_caption(panels, over), WIDTH - 0.2, 8))
    return figure


def _intervals(panels: Sequence[HeatPanel]) -> list[str]:
    found = [
        interval(cell, panel.unit)
        for panel in panels
        for row in panel.cells
        for cell in row
        if measured(cell) is not None and cell is not None
    ]
    return [text for text in found if text]


def _bound(panels: Sequence[HeatPanel], unit: Unit) -> float:
    """The value of the strongest colour: the largest of all cells that have one."""
    cells = [cell for panel in panels if panel.unit == unit for row in panel.cells for cell in row]
    return bound([cell for cell in cells if cell is not None and resolved(cell)], unit)


def _draw(axes: Any, panel: HeatPanel, most: float, columns: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    scale = LinearSegmentedColormap.from_list("difference", _SCALE)
    for row, cells in enumerate(panel.cells):
        for column, cell in enumerate(cells):
            own, place = measured(cell), (column - 0.5, row - 0.5)
            if own is None:
                axes.text(column, row, "–", ha="center", va="center", color=MUTED)
                continue
            known = resolved(own)
            face = scale(0.5 + 0.5 * scaled(own.value, panel.unit) / most) if known else EMPTY
            how = {} if known else {"hatch": "////", "edgecolor": _HATCH}
            axes.add_patch(Rectangle(place, 1, 1, facecolor=face, linewidth=0, **how))
            _write(axes, own, panel.unit, (column, row), face, known)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(panel.cells) - 0.5, -0.5)
    axes.set_xticks([n - 0.5 for n in range(columns + 1)], minor=True)
    axes.set_yticks([n - 0.5 for n in range(len(panel.cells) + 1)], minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.set_axisbelow(False)  # the grid parts the cells
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write(
    axes: Any, own: Estimate, unit: Unit, place: tuple[int, int], face: Any, known: bool
) -> None:
    """A cell's value and its interval, in the ink that is seen best."""
    column, row = place
    ink = _ink(face) if known else INK
    below = interval(own, unit)
    how: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
    if not known:  # the hatch ends where text begins
        how["bbox"] = {"facecolor": face, "edgecolor": "none", "pad": 0.8}
    weight = "bold" if known else "normal"
    axes.text(
        column, row - (0.14 if below else 0.0), signed(own.value, unit), fontsize=_VALUE,
        fontweight=weight, **how,
    )  # fmt: skip
    if below:
        axes.text(column, row + 0.24, below, fontsize=_INTERVAL, **how)


def _ink(face: Any) -> str:
    """White or the house's ink: what has the higher contrast (WCAG 2) on a colour."""
    from matplotlib.colors import to_rgb

    def luminance(colour: Any) -> float:
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in to_rgb(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    here, dark = luminance(face), luminance(INK)
    return "white" if 1.05 / (here + 0.05) > (here + 0.05) / (dark + 0.05) else INK


def _caption(panels: Sequence[HeatPanel], over: str) -> str:
    """What a cell has, and how an unresolved one looks."""
    units = list(dict.fromkeys(unit_name(panel.unit) for panel in panels))
    cells = [cell for panel in panels for row in panel.cells for cell in row]
    missing = any(measured(cell) is None for cell in cells)
    return (
        f"difference in {' or '.join(units)}, below it the 95 % interval"
        f"{f' over {over}' if over else ''}; blue: above 0, red: below 0; "
        f"grey and hatched: the interval holds 0{'; –: not measured' if missing else ''}"
    )
