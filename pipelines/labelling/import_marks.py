"""People's marks in an export of Label Studio become annotations datasets, one per person.

    trace-opd label export demo-verdicts labelling
    trace-opd label import export.json --alias human
    trace-opd compare human-anna human-ben demo-annotations

A mark stands for each segment with which it shares a visible character, and for those between.
Rollouts that a person did not answer have status skipped.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import filterfalse
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ...data.input_files import digest, find_files
from ...data.step_labels import KINDS
from ...data.store import Dataset, Draft, Store
from ...schemas.configs import SegmentConfig
from ...schemas.errors import InputError, quoted, shortened
from ...schemas.labels import AnnotationStatus, ErrorType, SpanKind
from ...schemas.tables import ANNOTATIONS, VERDICTS
from ..annotators.rows import SKIPPED, Identity, Item, Reading, Usage, annotation_row, items
from ..annotators.summary import summarize
from ..stages.base import give_name, make_dataset
from .project import RESPONSE
from .read_export import Answer, LabelledTask, Mark, people, read_export
from .shown import html_text, shown

READER_VERSION = 1  # raised when the same file makes other rows

_SPACE = re.compile(r"\s+|\\n")  # Label Studio writes a line end in a mark's text as \n


def import_marks(
    path: str,
    store: Store,
    alias: str,
    annotator: str | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Dataset]:
    """An annotations dataset per person of an export, by alias.

    path: Label Studio's export, JSON or JSON-MIN, of tasks that `export_tasks` wrote; alias: the
    prefix of the datasets' names; annotator: import only this person's answers, by their name in
    the file or in the alias; names: a name for each person that the file knows by number or e-mail
    address.

    Raises:
        InputError: names the file and the row at fault: not such an export, an unknown dataset or
            rollout, a changed text, a mark that is not where its text is.
    """
    tasks = read_export(path)
    _rename(tasks, names or {})
    aliases = _aliases(sorted(people(tasks)), alias)
    if annotator is not None:
        known = {name: full for name, full in aliases.items() if annotator in (name, full)}
        if not known:
            raise InputError(f"--annotator {quoted(annotator)}: is none of {', '.join(aliases)}")
        aliases = known
    try:
        verdicts = store.get(tasks[0].verdicts, VERDICTS)
    except InputError as error:
        raise InputError(
            f"{tasks[0].place}: its tasks are of a dataset that can't be read here: {error}"
        ) from None
    rollouts = verdicts.input("rollouts")
    inputs = {
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    _check_tasks(tasks, rollouts)
    fs, (found,) = find_files(path, KINDS)
    read = {"layout": "label-studio", "sha256": digest(fs, found), "reader": READER_VERSION}
    made = {}
    for name, full in aliases.items():
        answers, replaced = _answers_of(full, tasks)
        who = {"annotator": {"engine": "human", "name": full}}
        config = {"import": read | {"file": PurePosixPath(path).name}} | who
        target = store.begin("annotate", {"import": read} | who, inputs, ANNOTATIONS, config)
        made[f"{alias}-{name}"] = make_dataset(target, _maker(inputs, full, answers, replaced))
    for name, dataset in made.items():
        give_name(store, name, dataset)
    return made


def _rename(tasks: list[LabelledTask], names: Mapping[str, str]) -> None:
    """Give people their names. Raises InputError for a name of nobody in the file."""
    known = set(people(tasks))
    full = {next((k for k in (key, f"annotator-{key}") if k in known), key): key for key in names}
    if absent := [key for key in full if key not in known]:
        raise InputError(f"--name {quoted(absent[0])}: is none of {', '.join(sorted(known))}")
    for task in tasks:
        task.answers[:] = [
            replace(answer, annotator=names[full[answer.annotator]])
            if answer.annotator in full
            else answer
            for answer in task.answers
        ]


def _aliases(names: list[str], prefix: str) -> dict[str, str]:
    """A name that an alias may hold for each person: the local part of an e-mail address, unless
    two people share it."""
    local = [name.partition("@")[0] or name for name in names]
    if len({_plain(name) for name in local}) < len(names):
        local = names
    plain = {_plain(short): name for short, name in zip(local, names, strict=True)}
    if len(plain) < len(names):
        raise InputError(
            f"{prefix}: {len(names)} annotators have names that make the same alias "
            f"({', '.join(names)}); rename one in the file"
        )
    return plain


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "annotator"


def _answers_of(name: str, tasks: list[LabelledTask]) -> tuple[dict[str, Answer], int]:
    """A person's answer by rollout, and how many of them a later answer replaces."""
    answers: dict[str, Answer] = {}
    given = 0
    for task in tasks:
        for answer in task.answers:
            if answer.annotator == name:
                given += 1
                before = answers.get(task.rollout_id)
                if before is None or before.updated <= answer.updated:
                    answers[task.rollout_id] = answer
    return answers, given - len(answers)


def _check_tasks(tasks: list[LabelledTask], rollouts: Dataset) -> None:
    """Raises InputError if a task is of no rollout or of another text, or a mark of other words."""
    wanted = {task.rollout_id for task in tasks}
    responses: dict[str, str] = {}
    for part in range(rollouts.parts):
        table = rollouts.read_part(part, ["rollout_id", "response"])
        columns = (table[name].to_pylist() for name in ("rollout_id", "response"))
        responses |= {key: text for key, text in zip(*columns, strict=True) if key in wanted}
    for task in tasks:
        response = responses.get(task.rollout_id)
        if response is None:
            raise InputError(
                f"{task.place}: rollout_id {quoted(task.rollout_id)} is not in {rollouts.ref}; "
                "import the file into the store that its tasks are from"
            )
        _check_text(task, response)
        for answer in task.answers:
            for number, mark in enumerate(answer.marks):
                _check_mark(mark, f"{answer.place}, mark {number}", response)


def _check_text(task: LabelledTask, response: str) -> None:
    same = task.sha256 == sha256(response.encode()).hexdigest()
    for name, text in task.texts.items():
        plain = html_text(text) if name == RESPONSE else text
        same &= plain == shown(response)
    if not same:
        raise InputError(
            f"{task.place}: its text is not the response of rollout {task.rollout_id}, so its "
            "marks have no place; label the tasks as `trace-opd label export` writes them"
        )


def _check_mark(mark: Mark, place: str, response: str) -> None:
    if not 0 <= mark.start < mark.end <= len(response):
        raise InputError(
            f"{place}: spans characters {mark.start} to {mark.end}, the response has "
            f"{len(response)}; count in Unicode code points, from 0, the end excluded"
        )
    if mark.text is None:
        return
    there = shown(response[mark.start : mark.end])
    if _SPACE.sub("", shown(mark.text)) != _SPACE.sub("", there):
        raise InputError(
            f"{place}: text is {quoted(mark.text)}, the response has {quoted(there)} at characters "
            f"{mark.start} to {mark.end}; count in Unicode code points, from 0"
        )


def _maker(
    inputs: dict[str, Dataset], name: str, answers: dict[str, Answer], replaced: int
) -> Callable[[Draft], Dataset]:
    def tables(part: int) -> Iterator[pa.Table]:
        return (inputs[role].read_part(part) for role in ("problems", "rollouts", "verdicts"))

    def complete(draft: Draft) -> Dataset:
        parts = inputs["verdicts"].parts
        for part in filterfalse(draft.has_sound_part, range(parts)):
            problems, rollouts, verdicts = tables(part)
            work = items(problems, rollouts, verdicts, SegmentConfig())
            rows = [_row(item, name, answers.get(item.rollout_id)) for item in work]
            draft.write_part(part, ANNOTATIONS.table(rows))
        figures = summarize(draft.read_part(part) for part in range(parts))
        # That rows without a time share one answer holds for models alone.
        figures.pop("rows_sharing_an_answer", None)
        return draft.finish(parts, figures | _faults(draft, parts) | {"replaced": replaced})

    return complete


def _faults(draft: Draft, parts: int) -> dict[str, Any]:
    """How many rows are invalid, by reason."""
    found: Counter[str] = Counter()
    for part in range(parts):
        errors: Any = draft.read_part(part, ["error"])["error"].drop_null()
        found.update(errors.to_pylist())
    return {"left_out": dict(found)} if found else {}


def _row(item: Item, name: str, answer: Answer | None) -> dict[str, Any]:
    who = Identity(name, "human")
    if answer is None:
        return annotation_row(item, who, SKIPPED)
    kinds = {mark.kind for mark in answer.marks}
    kind = next(iter(kinds)) if len(kinds) == 1 else item.kind
    usage = Usage(latency_s=answer.seconds)
    # A person may mark an error in a right response: the kind is that of the marks.
    marked = replace(item, correct=kind is SpanKind.KEY)
    row = annotation_row(marked, who, _reading(answer, item, kinds), usage, answer.raw)
    return row | {"correct": item.verdict}


def _reading(answer: Answer, item: Item, kinds: set[SpanKind]) -> Reading:
    if answer.skipped:
        return SKIPPED
    if not answer.marks:
        if answer.type is not None:
            return _invalid("names a type and marks nothing")
        return Reading(AnnotationStatus.EMPTY)
    if len(kinds) > 1:
        return _invalid("marks key steps and errors")
    mistake = isinstance(answer.type, ErrorType)
    if mistake and SpanKind.KEY in kinds:
        return _invalid("names a mistake and marks key steps")
    marked = _segments(answer.marks, item)
    if not marked:
        return _invalid("marks only white space")
    # No table holds a mistake's label on a right response: its marks stand without the label.
    return Reading(AnnotationStatus.OK, marked, None if mistake and item.verdict else answer.type)


def _invalid(why: str) -> Reading:
    return Reading(AnnotationStatus.INVALID, error=f"the answer {shortened(why)}")


def _segments(marks: tuple[Mark, ...], item: Item) -> list[list[int]]:
    """The segments of each mark; one that two marks name belongs to the first."""
    named: list[list[int]] = []
    seen: set[int] = set()
    for mark in marks:
        touched = [
            index
            for index, (start, end) in enumerate(item.segments)
            if item.response[max(start, mark.start) : min(end, mark.end)].strip()
        ]
        if touched:
            new = [i for i in range(touched[0], touched[-1] + 1) if i not in seen]
            seen.update(new)
            named += [new] if new else []
    return named
