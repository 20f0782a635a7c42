"""The line format of a journal's files. The journal writes it; the journal and the budget read it.

{"key": …, "record": …}     an answer
{"reserved": …, "usd": …}   a request that is about to be sent, and the most that it may cost
{"settled": …}              the cost of that request is known: it was answered or refused
{"unanswered": …, "key": …} a request that ended without an answer, and why

A reservation that is never settled may have been billed: the process was killed or the connection
broke. The reader accepts any bytes.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

_MOST_TOKENS = 2**31

Record = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A paid answer, under the key of its question."""

    key: str
    record: Record


@dataclass(frozen=True)
class Reserved:
    """A request that may be billed, and the most that it may cost."""

    name: str
    usd: float


@dataclass(frozen=True)
class Settled:
    """The reservation of this name no longer counts."""

    name: str


@dataclass(frozen=True)
class Unanswered:
    """A request for a key's answer that got none.

    at_most: the most prompt and completion tokens that may be billed; None if nothing is, or if its
    reservation counts them.
    """

    key: str
    reason: str
    at_most: tuple[int, int] | None = None


Line = Answered | Reserved | Settled | Unanswered


def write_line(line: Line) -> bytes:
    match line:
        case Answered(key, record):
            value: Record = {"key": key, "record": record}
        case Reserved(name, usd):
            value = {"reserved": name, "usd": usd}
        case Settled(name):
            value = {"settled": name}
        case Unanswered(key, reason, at_most):
            value = {"unanswered": reason, "key": key, "at_most": at_most}
    return to_json(value) + b"\n"


def read_line(raw: bytes) -> Line | None:
    """The parsed line; None if it is damaged or something else."""
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
        case {"unanswered": str(reason), "key": str(key), "at_most": [int(prompt), int(tokens)]}:
            known = all(0 <= count < _MOST_TOKENS for count in (prompt, tokens))
            return Unanswered(key, reason, (prompt, tokens) if known else None)
        case {"unanswered": str(reason), "key": str(key)}:
            return Unanswered(key, reason)
    return None


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, int, Line | None]]:
    """Start, end and content of each line, from a byte offset on.

    An unterminated last line is left out: its writer has not finished it, or was killed.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            yield offset, offset + len(raw), read_line(raw)
            offset += len(raw)


def journal_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The regular files of a journal, without pipes and folders of such a name."""
    with os.scandir(folder) as entries:
        yield from (e for e in entries if e.name.endswith(".jsonl") and e.is_file())
