"""Responses whose steps people have judged, and what the readers of such labels share.

`trace-opd import` and the comparison of annotators with people use these. Each layout has a module
with `labelled_responses(path)`: `processbench` and `prm800k`.
"""

import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ...schemas.errors import InputError
from ..input_files import find_files, opened
from ..row_files import BadRow, bad_row, file_rows

Value = TypeVar("Value")

KINDS = "a JSONL, JSON or Parquet file"


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


def label_rows(
    path: str,
    read: Callable[[dict[str, Any], str], LabelledResponse | None],
    skip: Callable[[BadRow], None] | None = None,
) -> Iterator[LabelledResponse]:
    """The responses of a file's rows: `read` gets a row and its place ("file, row 3").

    path: a file that `file_rows` reads, or a URL that fsspec knows, such as
    hf://datasets/Qwen/ProcessBench/gsm8k.json. skip: called with each row that can't be used;
    None: the first of them is raised.

    Raises:
        InputError: no such file, not a regular file, too large, or a row that can't be used.
    """
    for where, row in json_rows(path):
        try:
            if isinstance(row, BadRow):
                raise row
            found = read(row, where)
        except BadRow as bad:
            if skip is None:
                raise
            skip(bad)
            continue
        if found is not None:
            yield found


def json_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of one file, each with its place."""
    name = posixpath.basename(path)
    fs, paths = find_files(path, KINDS)
    if len(paths) > 1:
        raise InputError(f"{path}: names {len(paths)} files; give one file")
    with opened(fs, paths[0]) as file:
        for row, value in file_rows(file, name):
            yield f"{name}, row {row}", value


def take(row: Any, name: str, kind: type[Value], where: str) -> Value:
    """The value at a dotted path in a row, checked to be of a type.

    Raises:
        BadRow: names the row and the field.
    """
    value = row
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise bad_row(where, f"{name} is missing", "is this another data set's file?")
        value = value[key]
    # In Python True is an int, but it is not a step's index.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        text = json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= 40 else text[:40] + "…"
        what = f"should be of type {kind.__name__}"
        raise bad_row(
            where,
            f"{name} {what}",
            "mend it or leave the row out",
            f"{name} is {shown}, and {what}",
        )
    return value
