"""The lines of a journal's file: how they are written, and a reader that no file makes fail.

{"key": …, "record": …}     an answer
{"reserved": …, "usd": …}   a request that is about to be sent, and the most that it may be billed
{"settled": …}              that request's bill is known: its answer is in the journal, or it was refused

A reservation that is never settled is money that may have been billed: a kill, a broken connection.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

Record = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A paid answer by the key of its question."""

    key: str
    record: Record


@dataclass(frozen=True)
class Reserved:
    """A request may be billed up to so much from now on."""

    name: str
    usd: float


@dataclass(frozen=True)
class Settled:
    """The reservation of that name no longer counts."""

    name: str


Line = Answered | Reserved | Settled


def write_line(line: Line) -> bytes:
    match line:
        case Answered(key, record):
            value: Record = {"key": key, "record": record}
        case Reserved(name, usd):
            value = {"reserved": name, "usd": usd}
        case Settled(name):
            value = {"settled": name}
    return to_json(value) + b"\n"


def read_line(raw: bytes) -> Line | None:
    """The line in these bytes; None if they hold something else."""
    try:
        value = from_json(raw)
    except ValueError:
        return None
    match value:
        case {"key": str(key), "record": dict(record)}:
            return Answered(key, record)
        case {"reserved": str(name), "usd": float(usd)} if 0 <= usd < math.inf:
            return Reserved(name, usd)
        case {"settled": str(name)}:
            return Settled(name)
    return None


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, int, Line | None]]:
    """First byte, end and content of each line from a byte on.

    A last line without an end is left out: it is still being written, or a kill has torn it.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            yield offset, offset + len(raw), read_line(raw)
            offset += len(raw)


def journal_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files of a journal's folder. A pipe or a folder of such a name is none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".jsonl") and entry.is_file():
                yield entry
