"""The column map: rows of other tables become rows of table problems.

The sources of kind `files` and `hub` call this.
"""

import random
from collections.abc import Callable, Iterable
from string import ascii_uppercase
from typing import Any

from ...schemas.configs import Columns
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind
from ..manifest import content_hash

_MOST_CELL_CHARS = 4 << 20  # more than any model reads


def mapped(columns: Columns) -> list[str]:
    """Names of the columns that the map reads, without duplicates."""
    names = [columns.problem, columns.answer, columns.solution, *(columns.choices or [])]
    return list(dict.fromkeys(name for name in names if name is not None))


def require(present: Iterable[str], columns: Columns, where: str) -> None:
    """Check that every mapped column is there.

    Raises:
        InputError: names `where`, the missing column and the columns that are there.
    """
    present = list(present)
    for name in mapped(columns):
        if name not in present:
            raise InputError(
                f"{where}: column {name!r} is missing; set source.columns to names out of "
                f"{', '.join(present) or 'no column at all'}"
            )


def problem_row(
    foreign: dict[str, Any],
    columns: Columns,
    answer_kind: AnswerKind,
    source: str,
    row: int,
    final_answer: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """One foreign row as a problems row.

    `final_answer` extracts the answer from a longer text. It returns "" if there is none: such a
    row is kept, and the parser of gold answers decides about it.

    Raises:
        InputError: the problem, the answer or a choice is empty, or neither text nor number.
    """
    where = f"{source}, row {row}"
    problem = _filled(foreign, columns.problem, where)
    if final_answer is not None:
        answer = final_answer(_text(foreign, columns.answer, where))
    else:
        answer = _filled(foreign, columns.answer, where)
    if columns.choices is not None:
        wrong = [_filled(foreign, name, where) for name in columns.choices]
        problem, answer = multiple_choice(problem, answer, wrong)
        answer_kind = AnswerKind.CHOICE
    solution = _text(foreign, columns.solution, where) if columns.solution else ""
    return {
        "problem": problem,
        "answer": answer,
        "answer_kind": answer_kind,
        "solution": solution or None,
        "steps": None,
        "source": source,
        "row": row,
    }


def multiple_choice(problem: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The problem with its choices as (A), (B), …, and the letter of the right one.

    The order depends on the texts alone, so a problem has the same id in every file.
    """
    choices = [right, *wrong]
    order = list(range(len(choices)))
    random.Random(content_hash([problem, *choices])).shuffle(order)
    lines = [
        f"({letter}) {choices[index]}"
        for letter, index in zip(ascii_uppercase, order, strict=False)
    ]
    return "\n".join([problem, "", *lines]), ascii_uppercase[order.index(0)]


def _filled(foreign: dict[str, Any], name: str, where: str) -> str:
    text = _text(foreign, name, where)
    if not text:
        raise InputError(f"{where}: column {name!r} is empty; fill it in or leave the row out")
    return text


def _text(foreign: dict[str, Any], name: str, where: str) -> str:
    """A cell as stripped text; integral floats lose their `.0`, null is ""."""
    value = foreign[name]
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and len(value) > _MOST_CELL_CHARS:
        raise InputError(
            f"{where}: column {name!r} holds {len(value):,} characters; the most is "
            f"{_MOST_CELL_CHARS:,}"
        )
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise InputError(
        f"{where}: column {name!r} holds a {type(value).__name__}; give text or a number"
    )
