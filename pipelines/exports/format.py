"""What a format of routed tables is; each file of this folder has one."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .source import RoutedSource


@dataclass(frozen=True)
class Options:
    """The command's options; None: not given.

    policy: of the tokenizer, where the store does not say it; scores: a scores dataset's name;
    groups_per_step: prompts a training step.
    """

    policy: str | None = None
    scores: str | None = None
    groups_per_step: int | None = None


@dataclass(frozen=True)
class File:
    """A file of an export. path: relative, with slashes; rows: training rows in it."""

    path: str
    content: bytes
    rows: int


@dataclass(frozen=True)
class Format:
    """summary, version, keeps, loses: sentences of the folder's README and of the docs' table.

    reads: names of Options that it reads. files:
    the export's files in their order.
    """

    summary: str
    version: str
    keeps: str
    loses: str
    files: Callable[[RoutedSource, Options], Iterator[File]]
    reads: tuple[str, ...] = ()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """A JSON object a line; a float32 has the digits of its exact value."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return "".join(lines).encode()
