"""Label Studio's exports, formats JSON and JSON-MIN, as answers of people.

import_marks.py calls `read_export`. Offsets of marks are code points of the response. Drafts,
predictions and results of other tags than ours are not read.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from ...data.row_files import BadRow, bad_row
from ...data.step_labels import json_rows, take
from ...schemas.config_faults import unknown_name
from ...schemas.errors import InputError, quoted
from ...schemas.labels import TYPE_LABELS, SpanKind, TypeLabel, type_label
from .project import LABELS, MARKS, RESPONSE, TYPE

_EXPORT_AGAIN = "export the project from Label Studio as JSON or JSON-MIN"


@dataclass(frozen=True)
class Mark:
    """Characters start … end of the response. text: as the tool shows them; None: unknown."""

    start: int
    end: int
    kind: SpanKind
    text: str | None


@dataclass(frozen=True)
class Answer:
    """What a person answered about a task. marks: in the person's order; updated: ISO 8601."""

    place: str
    annotator: str
    updated: str
    skipped: bool
    marks: tuple[Mark, ...]
    type: TypeLabel | None
    seconds: float
    raw: str


@dataclass(frozen=True)
class LabelledTask:
    """A task of an export. place: file and row; texts: the response as the task shows it."""

    place: str
    verdicts: str
    rollout_id: str
    sha256: str
    texts: dict[str, str]
    answers: list[Answer] = field(default_factory=list)


def read_export(path: str) -> list[LabelledTask]:
    """The tasks of an export that has at least one answer.

    Raises:
        InputError: no such file, not such an export, tasks of several exports, no answer.
    """
    tasks = [_task(row, place) for place, row in json_rows(path)]
    first = next(iter(tasks), None)
    if first is None or not any(task.answers for task in tasks):
        raise InputError(f"{path}: holds no annotation; label its tasks and export them again")
    for task in tasks:
        if task.verdicts != first.verdicts:
            raise InputError(
                f"{task.place}: data.verdicts is {quoted(task.verdicts)}, the file begins with "
                f"tasks of {quoted(first.verdicts)}; import each export of `trace-opd label "
                "export` on its own"
            )
    return tasks


def _task(row: dict[str, Any] | BadRow, place: str) -> LabelledTask:
    if isinstance(row, BadRow):
        raise row
    minimal = "data" not in row and "annotation_id" in row
    data = row if minimal else take(row, "data", dict, place)
    names = ("verdicts", "rollout_id", "response_sha256")
    verdicts, rollout_id, sha256 = (take(data, name, str, place) for name in names)
    texts = {name: take(data, name, str, place) for name in ("response", RESPONSE) if name in data}
    task = LabelledTask(place, verdicts, rollout_id, sha256, texts)
    if minimal:
        task.answers.append(_minimal_answer(row, place))
    else:
        annotations = take(row, "annotations", list, place)
        for number, annotation in enumerate(annotations):
            where = f"{place}, annotation {number}"
            if not isinstance(annotation, dict):
                raise bad_row(where, "is not an object", _EXPORT_AGAIN)
            task.answers.append(_answer(annotation, where))
    return task


def _answer(annotation: dict[str, Any], place: str) -> Answer:
    """An annotation of format JSON."""
    result = take(annotation, "result", list, place)
    marks, chosen = [], None
    for number, entry in enumerate(result):
        where = f"{place}, result {number}"
        name = take(entry, "from_name", str, where) if "from_name" in _object(entry, where) else ""
        if name == MARKS:
            marks.append(_mark(take(entry, "value", dict, where), where))
        elif name == TYPE:
            chosen = _type(take(entry, "value.choices", list, where), where)
    return Answer(
        place,
        annotator=_annotator(annotation.get("completed_by"), place),
        updated=_updated(annotation),
        skipped=annotation.get("was_cancelled") is True,
        marks=tuple(marks),
        type=chosen,
        seconds=_seconds(annotation),
        raw=json.dumps(result, ensure_ascii=False, sort_keys=True),
    )


def _minimal_answer(row: dict[str, Any], place: str) -> Answer:
    """A row of format JSON-MIN, which holds one annotation."""
    values = take(row, MARKS, list, place) if MARKS in row else []
    marks = [
        _mark(_object(v, f"{place}, mark {n}"), f"{place}, mark {n}") for n, v in enumerate(values)
    ]
    chosen = None if row.get(TYPE) is None else _type([take(row, TYPE, str, place)], place)
    raw = {name: row[name] for name in (MARKS, TYPE) if name in row}
    return Answer(
        place,
        annotator=_annotator(row.get("annotator"), place),
        updated=_updated(row),
        skipped=False,
        marks=tuple(marks),
        type=chosen,
        seconds=_seconds(row),
        raw=json.dumps(raw, ensure_ascii=False, sort_keys=True),
    )


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_row(place, "is not an object", _EXPORT_AGAIN)
    return value


def _mark(value: dict[str, Any], place: str) -> Mark:
    offsets = "globalOffsets." if "globalOffsets" in value else ""  # HyperText's; else Text's
    start, end = (take(value, offsets + name, int, place) for name in ("start", "end"))
    labels = take(value, LABELS, list, place)
    if len(labels) != 1:
        raise bad_row(
            place, f"{LABELS} holds {len(labels)} labels", "give each mark one, key or error"
        )
    known = [str(kind) for kind in SpanKind]
    if labels[0] not in known:
        raise bad_row(place, f"label {unknown_name(str(labels[0]), known)}", "label it anew")
    text = take(value, "text", str, place) if value.get("text") is not None else None
    return Mark(start, end, SpanKind(labels[0]), text)


def _type(chosen: list[Any], place: str) -> TypeLabel | None:
    if len(chosen) > 1:
        raise bad_row(place, f"{TYPE} holds {len(chosen)} choices", "choose one")
    if not chosen:
        return None
    known = [str(label) for label in TYPE_LABELS]
    if chosen[0] not in known:
        raise bad_row(place, f"{TYPE} {unknown_name(str(chosen[0]), known)}", "choose anew")
    return type_label(chosen[0])


def _annotator(who: Any, place: str) -> str:
    """A person's name: a text, Label Studio's number of a user, or its description of one."""
    if isinstance(who, dict):
        full = " ".join(str(who[name]) for name in ("first_name", "last_name") if who.get(name))
        who = who.get("email") or full or who.get("id")
    if isinstance(who, int) and not isinstance(who, bool):
        return f"annotator-{who}"
    if isinstance(who, str) and who.strip():
        return who.strip()
    raise bad_row(
        place, "names no annotator (completed_by, or annotator in JSON-MIN)", _EXPORT_AGAIN
    )


def _updated(row: dict[str, Any]) -> str:
    return str(row.get("updated_at") or row.get("created_at") or "")


def _seconds(row: dict[str, Any]) -> float:
    seconds = row.get("lead_time")
    if isinstance(seconds, int | float) and 0 <= seconds < 1e9:
        return float(seconds)
    return 0.0


def people(tasks: list[LabelledTask]) -> set[str]:
    """The annotators who answered."""
    return {answer.annotator for task in tasks for answer in task.answers}
