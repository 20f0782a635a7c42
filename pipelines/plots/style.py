"""The look of every plot: colours, type, axes, and files whose bytes depend on the figures alone.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any colour
vision can tell apart, without their yellow, which is too pale for lines on white.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ...data.atomic import write_atomic
from ...schemas.errors import InputError
from ...schemas.extras import require

INK, MUTED, RULE, EMPTY = "#1b1e23", "#5b626c", "#dcdcd6", "#ececea"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
MARKERS = "os^Dvp"
FORMATS = (".png", ".svg")
WIDTH = 7.2  # inches; a README shows about 115 pixels of each

_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "svg.hashsalt": "trace-opd",  # else the ids in an SVG are random
    "savefig.dpi": 200,
}


def require_format(path: Path) -> None:
    """Raise InputError unless a file's ending is one that plots are written in, and matplotlib is
    installed."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"--output {path}: ends in {path.suffix!r}; give a file that ends in "
            f"{' or '.join(FORMATS)}"
        )
    require("matplotlib")


@contextmanager
def styled() -> Iterator[None]:
    """Within the block figures get this look; a caller's own settings stay as they are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def new_figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row. height: of a row, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def style_of(index: int) -> dict[str, Any]:
    """Colour and dash of a line: no two of the first 21 are equal."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash}


def darker(colour: str) -> str:
    """A colour for small text: pale ones are hard to read on white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    return to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def percent(axis: Any) -> None:
    """Show shares as per cent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def whole_steps(axis: Any) -> None:
    """Ticks of steps at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def caption(figure: Any, text: str) -> None:
    """What bands and intervals are, in small type below the panels."""
    figure.supxlabel(text, fontsize=8, color=MUTED, x=0.012, ha="left")


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of a line of text, in inches. size: of its type, in points."""
    return sum(_advance(character, bold) for character in text) * size / 72


@cache
def _advance(character: str, bold: bool) -> float:
    """How far a character moves the next one, per point of its size."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight=700 if bold else 400)))
    font.set_size(100, 72)
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / 100


def text_height(texts: Sequence[str], size: float) -> float:
    """Height of the text with most lines, in inches."""
    return max(text.count("\n") + 1 for text in texts) * size * 1.2 / 72


def wrapped(text: str, width: float, size: float, bold: bool = False) -> str:
    """A text in lines of at most so many inches, cut at spaces.

    A word that is longer is cut after its hyphens; what is still longer has its own line.
    """
    lines = [""]
    for word in text.split():
        long = text_width(word, size, bold) > width
        for number, part in enumerate(re.split(r"(?<=\w-)(?=\w)", word) if long else [word]):
            longer = f"{lines[-1]}{'' if number else ' '}{part}".strip()
            if lines[-1] and text_width(longer, size, bold) > width:
                lines.append(part)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as they can be `gap` apart, in the same order.

    They lie between low and high as far as there is room.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[float]] = []  # the sum of wanted first places, and how many labels
    for index in order:
        blocks.append([wanted[index], 1])
        while len(blocks) > 1 and _start(blocks[-2], gap) + gap * blocks[-2][1] > _start(
            blocks[-1], gap
        ):
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    places: list[float] = []
    for block in blocks:
        places += [_start(block, gap) + gap * place for place in range(int(block[1]))]
    for place in range(len(places)):  # the lowest first
        least = low if place == 0 else places[place - 1] + gap
        places[place] = max(places[place], least)
    for place in reversed(range(len(places))):
        most = high if place == len(places) - 1 else places[place + 1] - gap
        places[place] = min(places[place], most)
    out = [0.0] * len(wanted)
    for place, index in zip(places, order, strict=True):
        out[index] = place
    return out


def _start(block: list[float], gap: float) -> float:
    """The first place of a block whose places are on the mean nearest to the wanted ones."""
    total, count = block
    return total / count - gap * (count - 1) / 2


def encoded(figure: Any, suffix: str) -> bytes:
    """A figure as a file; equal figures make equal bytes."""
    drawn = io.BytesIO()
    kind = suffix.lower().lstrip(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(drawn, format=kind, metadata=metadata, facecolor="white")
    return drawn.getvalue()


def write(figure: Any, path: Path) -> None:
    """Write a figure as its path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encoded(figure, path.suffix))
