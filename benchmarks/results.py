"""Files of results: tables in JSON that are replaced, and logs in JSON Lines that only grow.

A log line is on disk when `append` returns, so a run that is killed keeps what it has measured.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def write_rows(file: str | Path, rows: list[Row], same: tuple[str, ...] = ("device",)) -> None:
    """Write a table; rows of the file that differ from all new ones in a field of `same` stay.

    file: a path, or a name in benchmarks/results.
    """
    target = RESULTS / file
    target.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(target.read_text()) if target.exists() else []
    measured = {tuple(row.get(name) for name in same) for row in rows}
    kept = [row for row in before if tuple(row.get(name) for name in same) not in measured]
    every = sorted(rows + kept, key=lambda row: [str(row.get(name)) for name in same])
    target.write_text(json.dumps(every, indent=2) + "\n")


def append(log: Path, rows: Iterable[Row]) -> None:
    """Add lines to a log. A line that a kill tore is ended first, so that it spoils no other."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_log(log: Path) -> list[Row]:
    """The rows of a log, without damaged lines; [] if there is none."""
    rows = []
    for line in log.read_bytes().splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def ratio(value: float | None, base: float | None) -> str:
    """A cell: value as a multiple of base."""
    return f"{value / base:.2f}" if value is not None and base else "–"


def number(value: float | None, form: str = ",.0f") -> str:
    """A cell; a dash where nothing was measured."""
    return "–" if value is None else format(value, form)


def console() -> Console:
    """A console; outside a terminal as wide as the widest table."""
    return Console(width=None if sys.stdout.isatty() else 150)
