"""Progress bars on standard error: stages, the study and `trace-opd verify-store` show them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .terminal import Terminal

_bars: list[Callable[..., None]] = []


def show_fields(**fields: object) -> None:
    """Show fields after the open progress bar before its next step. Any thread may call it."""
    if _bars:
        _bars[-1](0, **fields)


@contextmanager
def progress_bar(name: str, total: int, unit: str = "parts") -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; silent when that is not a terminal.

    Yields `advance(count=1, **fields)`; fields are shown after the bar until others replace them.
    """
    console = Terminal(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(name, total=total, note="")

        def advance(count: int = 1, **fields: object) -> None:
            progress.update(task, advance=count)
            if fields:
                note = "  ".join(f"{key} {value}" for key, value in fields.items())
                progress.update(task, note=note)

        _bars.append(advance)
        try:
            yield advance
        finally:
            _bars.remove(advance)
