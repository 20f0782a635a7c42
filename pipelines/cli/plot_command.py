"""`trace-opd plot`. commands.py adds it; slow imports are inside."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...schemas.errors import InputError
from ..terminal import console
from .store_commands import StoreRoot, open_store


def plot(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Train runs, or annotations datasets (alias, id or stage/id); or a study's folder."
        ),
    ],
    what: Annotated[
        Literal["curves", "coverage", "types", "exposure", "agreement"] | None,
        typer.Option(help="What to draw; default: curves of runs, agreement of annotations."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric of the curves, by its name in metrics.jsonl; may be repeated. Default: "
            "the pass rates of validation, else those of the steps."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File, .png or .svg; default: WHAT.png here."),
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Draw runs or annotations as a picture, runs that differ in their seed alone as one line.

    A study's folder: draw its plots again from its tables.
    """
    folder = Path(names[0])
    from ..study.figures import is_study, redraw

    if is_study(folder):
        if len(names) > 1 or what or metric or output:
            raise InputError(
                f"{folder}: is the folder of a study, whose plots all have their names; give it "
                "alone"
            )
        for path in redraw(folder):
            console.print(path, soft_wrap=True, highlight=False)
        return
    from ..plots.plot import plot as draw

    path = draw(names, open_store(store), what, metric or (), output)
    console.print(path, soft_wrap=True, highlight=False)
