"""Responses whose steps people have judged, and how files of such labels are read.

One module per layout in `sources` (processbench, prm800k), each with `labelled_responses(path)`.
"""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from ..schemas.errors import InputError
from .json_text import read_json

Value = TypeVar("Value")


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
        InputError: no such file, or something in it that is no JSON object.
    """
    name = posixpath.basename(path)
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            text = file.read()  # type: ignore[union-attr] - one file, not a list of them
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: is no file; give a JSON or JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: is no UTF-8 text; give a JSON or JSONL file") from None
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{name}: is a Git LFS pointer, not the data; run git lfs pull")
    rows = _array(text, name) if text.lstrip().startswith("[") else _lines(text, name)
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


def _lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for row, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            yield row, read_json(line)
        except ValueError as error:
            raise InputError(f"{name}, row {row}: is not JSON ({error}); mend the line") from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
