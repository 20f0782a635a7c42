"""Responses whose steps people have judged, and what the readers of such labels share.

`trace-opd import` and the comparison of annotators with people use these. Each layout has a module
with `labelled_responses(path)`: `processbench` and `prm800k`.
"""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from ...schemas.errors import InputError
from ..input_files import find_files, json_objects, opened, read_json, text_lines

Value = TypeVar("Value")

_MOST_ARRAY_CHARS = 256 << 20  # a JSON array is parsed in one piece


@dataclass(frozen=True)
class LabelledResponse:
    """A response in steps, and the first step that people judged wrong.

    source: where the problem comes from; answer: the problem's gold answer, None if the file has
    none; steps: texts in order, joined by `separator`; first_wrong: index of the first wrong step,
    None if all are right; correct: whether the final answer is right, None if that must be found by
    comparing `stated` with `answer`.
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
        InputError: no such file, not a regular file, too large, or a row that is not a JSON object.
    """
    name = posixpath.basename(path)
    fs, paths = find_files(path, "a JSON or JSONL file")
    if len(paths) > 1:
        raise InputError(f"{path}: names {len(paths)} files; give one JSON or JSONL file")
    with opened(fs, paths[0]) as file:
        lines = text_lines(file, name)
        first = next((line for line in lines if line[1].strip()), None)
        if first is None:
            return
        if first[1].startswith("version https://git-lfs"):
            raise InputError(f"{name}: is a Git LFS pointer, not the data; run git lfs pull")
        read = _array if first[1].lstrip().startswith("[") else json_objects
        for row, value in read(chain([first], lines), name):
            yield f"{name}, row {row}", value


def _array(lines: Iterator[tuple[int, str]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    held, size = [], 0
    for _, line in lines:
        held.append(line)
        size += len(line)
        if size > _MOST_ARRAY_CHARS:
            raise InputError(
                f"{name}: is a JSON array of more than {_MOST_ARRAY_CHARS:,} characters; write "
                "JSON lines"
            )
    try:
        values = read_json("".join(held))
    except ValueError as error:
        raise InputError(f"{name}: is not JSON ({error}); load it again") from None
    for row, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"{name}, row {row}: is not a JSON object; write one object per row")
        yield row, value


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
    # In Python True is an int, but it is not a step's index.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        text = json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise InputError(
            f"{where}: {name} is {shown}, and should be of type {kind.__name__}; mend it "
            "or leave the row out"
        )
    return value
