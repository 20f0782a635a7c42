"""Responses whose steps people have judged, and how files of such labels are read.

One module per layout in `sources` (processbench, prm800k), each with `labelled_responses(path)`.
"""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from ..schemas.errors import InputError
from .foreign_files import find_files, opened, text_lines
from .json_text import read_json

Value = TypeVar("Value")

_MOST_ARRAY_CHARS = 256 << 20  # an array is parsed as a unit


@dataclass(frozen=True)
class LabelledResponse:
    """A response in steps, and where people saw it go wrong.

    source: where the problem comes from; answer: the problem's gold answer, None if the file does
    not tell; steps: texts in order, `separator` stands between them; first_wrong: index of the
    first wrong step, None if no step is wrong; correct: whether the final answer is right, None
    where it is to be found by comparing `stated` with `answer`.
    """

    source: str
    problem: str
    answer: str | None
    solution: str | None
    generator: str
    steps: tuple[str, ...]
    separator: str
    first_wrong: int | None
    correct: bool | None
    stated: str | None = None

    @property
    def response(self) -> str:
        return self.separator.join(self.steps)

    def step_range(self, step: int) -> tuple[int, int]:
        """First character of a step in the response, and one past its last."""
        start = sum(len(text) + len(self.separator) for text in self.steps[:step])
        return start, start + len(self.steps[step])


def json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON array or of JSON lines, each with its place: "file, row 3".

    path: a file, or a URL that fsspec knows, such as hf://datasets/Qwen/ProcessBench/gsm8k.json.

    Raises:
        InputError: no such file, one that is no regular file or too large, or something in it that is
            no JSON object.
    """
    name = posixpath.basename(path)
    fs, paths = find_files(path, "a JSON or JSONL file")
    if len(paths) > 1:
        raise InputError(f"{path}: names {len(paths)} files; give one JSON or JSONL file")
    with opened(fs, paths[0]) as file:
        yield from _objects(_rows(file, name), name)


def _rows(file: Any, name: str) -> Iterator[tuple[int, Any]]:
    lines = text_lines(file, name)
    first = next(((row, line) for row, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].startswith("version https://git-lfs"):
        raise InputError(f"{name}: is a Git LFS pointer, not the data; run git lfs pull")
    if first[1].lstrip().startswith("["):
        yield from _array(_text(chain([first], lines), name), name)
    else:
        yield from _lines(chain([first], lines), name)


def _text(lines: Iterator[tuple[int, str]], name: str) -> str:
    held, size = [], 0
    for _, line in lines:
        held.append(line)
        size += len(line)
        if size > _MOST_ARRAY_CHARS:
            raise InputError(
                f"{name}: is a JSON array of more than {_MOST_ARRAY_CHARS:,} characters; write JSON "
                "lines"
            )
    return "".join(held)


def _objects(rows: Iterator[tuple[int, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for row, value in rows:
        where = f"{name}, row {row}"
        if not isinstance(value, dict):
            raise InputError(f"{where}: is no JSON object; give one object per row")
        yield where, value


def take(row: Any, name: str, kind: type[Value], where: str) -> Value:
    """The value at a dotted path in a row, checked to be of a type.

    Raises:
        InputError: names the row and the field.
    """
    value = row
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise InputError(f"{where}: {name} is missing; is this another data set's file?")
        value = value[key]
    # True is an int to Python, and no step's index.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(
            f"{where}: {name} is {_shown(value)}, and should be of type {kind.__name__}; mend it "
            "or leave the row out"
        )
    return value


def _array(text: str, name: str) -> Iterator[tuple[int, Any]]:
    try:
        return iter(enumerate(read_json(text)))
    except ValueError as error:
        raise InputError(f"{name}: is not JSON ({error}); load it again") from None


def _lines(lines: Iterator[tuple[int, str]], name: str) -> Iterator[tuple[int, Any]]:
    for row, line in lines:
        if not line.strip():
            continue
        try:
            yield row, read_json(line)
        except ValueError as error:
            raise InputError(f"{name}, row {row}: is not JSON ({error}); mend the line") from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
