"""Rows of other tables become rows of table problems.

Sources `files` and `hub` call `problem_row` with the table's column map (columns.py).
"""

import json
import random
import re
from collections.abc import Callable
from functools import lru_cache
from string import Formatter, ascii_uppercase
from typing import Any

from ...schemas.labels import AnswerKind
from ..boxed import boxed_answer
from ..manifest import content_hash
from ..row_files import BadRow, bad_row
from .columns import ColumnMap, cell
from .conversations import Turns, turns_of
from .program_tests import metadata_of, whole_solution

_MOST_CELL_CHARS = 4 << 20  # more than any model reads
_MOST_CHOICES = len(ascii_uppercase)
_LEAVE = "fill it in, or skip such rows by on_bad_rows=skip"
_LABELLED = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*(.*)", re.DOTALL)


# GSM8K's last line. Other lines that begin with #### are headings. Arrow reads the pattern too.
HASHED = re.compile(r"(?:^|\n)#### +([^\n]*[^\s][^\n]*)\s*$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def after_hashes(text: str) -> str:
    """GSM8K's final answer: the last line's text after `#### `, without thousands separators; "" if
    there is none."""
    found = HASHED.search(text)
    return _THOUSANDS.sub("", found[1]).strip() if found else ""


def boxed_or_empty(text: str) -> str:
    """The boxed answer of a solution, in parts if several boxes give it; "" if there is none."""
    return boxed_answer(text) or ""


def problem_row(
    foreign: dict[str, Any],
    columns: ColumnMap,
    answer_kind: AnswerKind,
    source: str,
    row: int,
    keep_unread: bool = False,
) -> dict[str, Any] | BadRow:
    """One foreign row as a problems row, or why it is none.

    keep_unread: keep a row whose longer text holds no final answer, with answer "": the parser of
    gold answers decides about it.
    """
    try:
        return _row(foreign, columns, answer_kind, source, row, keep_unread)
    except BadRow as bad:
        return bad


def _row(
    foreign: dict[str, Any],
    columns: ColumnMap,
    answer_kind: AnswerKind,
    source: str,
    row: int,
    keep_unread: bool,
) -> dict[str, Any]:
    where = f"{source}, row {row}"
    for name in columns.images:
        if holds_file(cell(foreign, name)):
            raise image_row(where, name)
    metadata = metadata_of(foreign, columns, where)
    history: Turns = []
    if columns.messages is not None:
        problem, history, foreign = _conversation(foreign, columns, where)
    elif columns.template is not None:
        problem = _rendered(foreign, columns.template, where, _problem_text)
    else:
        problem = _filled(_problem_text(foreign, columns.problem, where), columns.problem, where)
    solution = (_text(foreign, columns.solution, where) or None) if columns.solution else None
    if not columns.answer and columns.answer_template is None:
        answer_kind = AnswerKind.TEXT
        solution = whole_solution(problem, solution, metadata)
        answer = solution or "a program that passes the tests"
    elif isinstance(columns.choices, str):
        answer_kind = AnswerKind.CHOICE
        problem, answer = _given_choices(foreign, columns, problem, where)
    else:
        answer = _answer(foreign, columns, where, keep_unread)
        if columns.choices is not None:
            wrong = [_filled(_text(foreign, n, where), n, where) for n in columns.choices]
            problem, answer = multiple_choice(problem, answer, wrong)
            answer_kind = AnswerKind.CHOICE
    out = {
        "problem": problem,
        "answer": answer,
        "answer_kind": answer_kind,
        "solution": solution,
        "steps": None,
        "source": source,
        "row": row,
    }
    if metadata is not None:
        out["metadata"] = json.dumps(metadata)
    if columns.messages is not None:
        out["history"] = history or None
    about = {"source_id": columns.id, "subject": columns.subject, "level": columns.level}
    return out | {
        role: _text(foreign, name, where) or None
        for role, name in about.items()
        if name is not None
    }


def _conversation(
    foreign: dict[str, Any], columns: ColumnMap, where: str
) -> tuple[str, Turns, dict[str, Any]]:
    """The user's last turn, the turns before it, and the row with the reference, if the
    conversation ends with one, in the conversation's place."""
    name = str(columns.messages)
    answered = name in (columns.answer, columns.solution)
    turns = turns_of(cell(foreign, name), name, where, _plain_text, answered)
    if answered:
        foreign = foreign | {name: turns.pop()["content"]}
    return turns[-1]["content"], turns[:-1], foreign


def _answer(foreign: dict[str, Any], columns: ColumnMap, where: str, keep_unread: bool) -> str:
    if columns.answer_template is not None:
        return _rendered(foreign, columns.answer_template, where, _text)
    name = columns.answer
    text = _text(foreign, name, where)
    if columns.final == "hashes":
        text = after_hashes(text) or ("" if keep_unread else text)
    elif columns.final == "solution":
        text = boxed_or_empty(text) or after_hashes(text)
    if columns.final is not None and not text and keep_unread:
        return ""
    if columns.final == "solution" and not text:
        what = f"column {name!r} holds no final answer in \\boxed{{}} or after ####"
        raise bad_row(where, what, "give an answer column, or leave the row out")
    if name.endswith(".ground_truth") and text.startswith('["'):
        text = _only_entry(text)
    return _filled(text, name, where)


def _rendered(foreign: dict[str, Any], template: str, where: str, text: Callable[..., str]) -> str:
    """A template with the cells of its columns, some of which may be empty."""
    cells = {name: text(foreign, name, where) for _, name in _pieces(template) if name is not None}
    if not any(cells.values()):
        what = f"columns {', '.join(map(repr, cells))} of a template are all empty"
        raise bad_row(where, what, _LEAVE)
    return "".join(
        literal + ("" if name is None else cells[name]) for literal, name in _pieces(template)
    ).strip()


@lru_cache(maxsize=64)
def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Literal texts of a template, each with the column after it."""
    return [(literal, name) for literal, name, _, _ in Formatter().parse(template)]


def holds_file(value: Any) -> bool:
    """Whether a cell holds an image, a sound or another file, as `datasets` writes them."""
    if isinstance(value, list):
        return any(map(holds_file, value))
    return isinstance(value, dict) and bool(value.get("bytes") or value.get("path"))


def image_row(where: str, name: str) -> BadRow:
    return bad_row(
        where,
        f"column {name!r} holds an image or another file",
        "models read the text alone here: drop the column if problems need no image, or leave such "
        "rows out by on_bad_rows=skip",
    )


def _only_entry(text: str) -> str:
    """The answer of a list in JSON that holds it alone, as some sets of verl's layout write it."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0].strip() if single else text


def multiple_choice(problem: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The problem with its choices as (A), (B), …, and the letter of the right one.

    The order depends on the texts alone, so a problem has the same id in every file.
    """
    choices = [right, *wrong]
    order = list(range(len(choices)))
    random.Random(content_hash([problem, *choices])).shuffle(order)
    shuffled = [choices[index] for index in order]
    return _with_choices(problem, shuffled), ascii_uppercase[order.index(0)]


def _with_choices(problem: str, choices: list[str]) -> str:
    lines = [f"({letter}) {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([problem, "", *lines])


def _given_choices(
    foreign: dict[str, Any], columns: ColumnMap, problem: str, where: str
) -> tuple[str, str]:
    """The problem with its choices in their own order, and the letter of the right one."""
    name = str(columns.choices)
    texts, labels = _choice_list(cell(foreign, name), name, where)
    letter = _right_letter(foreign, columns.answer, texts, labels, where)
    if "(A)" in problem and all(text in problem for text in texts):
        return problem, letter
    return _with_choices(problem, texts), letter


def _choice_list(value: Any, name: str, where: str) -> tuple[list[str], list[str]]:
    """Texts and labels of the choices: a list of texts, or texts and labels as on the hub."""
    labels = None
    if isinstance(value, dict):
        labels, value = value.get("label") or value.get("labels"), value.get("text")
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        labels, value = [v.get("label") for v in value], [v.get("text") for v in value]
    if not isinstance(value, list) or not 2 <= len(value) <= _MOST_CHOICES:
        raise bad_row(where, f"column {name!r} is no list of 2 to {_MOST_CHOICES} choices", _LEAVE)
    texts = [_filled(_plain_text(v, name, where), name, where) for v in value]
    if labels is None:
        split = [_LABELLED.fullmatch(text) for text in texts]
        if all(m and m[1] == letter for m, letter in zip(split, ascii_uppercase, strict=False)):
            texts = [m[2].strip() for m in split if m]
        labels = ascii_uppercase
    return texts, [str(label) for label in labels][: len(texts)]


def _right_letter(
    foreign: dict[str, Any], name: str, texts: list[str], labels: list[str], where: str
) -> str:
    """The letter of the choice that the answer names: by label, by text, or by index from 0."""
    value = cell(foreign, name)
    text = _filled(_text(foreign, name, where), name, where)
    plain = text.strip("().").upper()
    found = {at for at, label in enumerate(labels) if label.upper() == plain}
    found |= {at for at, choice in enumerate(texts) if choice == text}
    if labels == list(ascii_uppercase[: len(texts)]) and text.isdecimal():
        by_index = {int(text)} & set(range(len(texts)))
        found = found | by_index if isinstance(value, int) else found or by_index
    if len(found) != 1:
        what = f"column {name!r} names {'several choices' if found else 'none of the choices'}"
        raise bad_row(where, what, "give a letter", f"{what} ({text:.40})")
    return ascii_uppercase[found.pop()]


def _problem_text(foreign: dict[str, Any], name: str, where: str) -> str:
    """A cell's text; of a chat, the user's only message."""
    value = cell(foreign, name)
    if not isinstance(value, list):
        return _text(foreign, name, where)
    said: list[tuple[Any, Any]] = [
        (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
        for turn in value
        if isinstance(turn, dict)
    ]
    turns = [(role, text) for role, text in said if role != "system"]
    if len(said) != len(value) or len(turns) != 1 or turns[0][0] not in ("user", "human"):
        raise bad_row(
            where,
            f"column {name!r} is a list, and no chat with one message of the user",
            f"fill it in, set source.columns.messages={name} to read conversations, or skip such "
            "rows by on_bad_rows=skip",
        )
    return _plain_text(turns[0][1], name, where)


def _filled(text: str, name: str, where: str) -> str:
    if not text:
        raise bad_row(where, f"column {name!r} is empty", _LEAVE)
    return text


def _text(foreign: dict[str, Any], name: str, where: str) -> str:
    return _plain_text(cell(foreign, name), name, where)


def _plain_text(value: Any, name: str, where: str) -> str:
    """A cell as stripped text; integral floats lose their `.0`, null is ""."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and len(value) > _MOST_CELL_CHARS:
        raise bad_row(
            where,
            f"column {name!r} holds more than {_MOST_CELL_CHARS:,} characters",
            f"the most is {_MOST_CELL_CHARS:,}",
            f"column {name!r} holds {len(value):,} characters",
        )
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise bad_row(where, f"column {name!r} holds a {type(value).__name__}", "give text or a number")
