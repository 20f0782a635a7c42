"""Rollouts as tasks for Label Studio. `trace-opd label export` calls `export_tasks`.

docs/labelling.md describes the files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...data.atomic import write_atomic
from ...data.store import Dataset, Store
from ...schemas.configs import SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus, Selection
from ...schemas.tables import ANNOTATIONS, VERDICTS
from ..annotators.rows import Item, items
from .project import FIELDS, LABELS, MARKS, RESPONSE, TYPE, config_xml
from .shown import TextNode, response_html, shown

CONFIG, TASKS = "config.xml", "tasks.json"
_NONE = "–"  # a text that is absent; Label Studio shows an empty one as a fault
_ANSWERED = (AnnotationStatus.OK, AnnotationStatus.EMPTY)


@dataclass(frozen=True)
class Choice:
    """Which rollouts become tasks, and what the tasks show.

    limit: at most this many, drawn by `seed`; correct: only right or only wrong ones; None: all.
    """

    limit: int | None = None
    seed: int = 0
    correct: bool | None = None
    hide_verdict: bool = False
    hide_reference: bool = False


def export_tasks(
    ref: str, folder: Path, store: Store, choice: Choice, marked_by: str | None = None
) -> int:
    """Write config.xml and tasks.json; the number of tasks.

    ref: verdicts dataset; marked_by: annotations dataset of the same rollouts, whose marks become
    pre-annotations. Rollouts without a verdict, and those that stage select leaves out, are left
    out.

    Raises:
        InputError: no such dataset, annotations of other rollouts, or no rollout is left.
    """
    verdicts = store.get(ref, VERDICTS)
    known = {} if marked_by is None else _marks(store.get(marked_by, ANNOTATIONS), verdicts)
    hidden = {name for name in ("verdict", "reference") if getattr(choice, f"hide_{name}")}
    found = list(_items(verdicts, _chosen(verdicts, choice)))
    if not found:
        raise InputError(
            f"dataset {verdicts.ref}: no rollout with a verdict and a text is left to label; name "
            "other verdicts, or leave out --only"
        )
    if not any(item.problem.get("history") for item in found):
        hidden.add("history")
    tasks = [_task(item, verdicts.ref, hidden, known.get(item.rollout_id)) for item in found]
    fields = [name for name in FIELDS if name not in hidden]
    content = json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
    write_atomic(folder / CONFIG, config_xml(fields).encode())
    write_atomic(folder / TASKS, content.encode())
    return len(tasks)


def _marks(annotations: Dataset, verdicts: Dataset) -> dict[str, dict[str, Any]]:
    """The answered rows of an annotations dataset by rollout."""
    ours, theirs = verdicts.input("rollouts").ref, annotations.input("rollouts").ref
    if ours != theirs:
        raise InputError(
            f"dataset {annotations.ref} annotates {theirs}, the verdicts are of {ours}; name "
            "annotations of the same rollouts"
        )
    columns = ["rollout_id", "status", "spans", "diagnostic_type", "annotator_name"]
    rows = annotations.read(columns).to_pylist()
    return {row["rollout_id"]: row for row in rows if row["status"] in _ANSWERED}


def _chosen(verdicts: Dataset, choice: Choice) -> pa.Array:
    """Ids of the rollouts that become tasks.

    A sample is the ids with the smallest hashes, so a larger limit keeps a smaller one's rollouts.
    """
    ids: list[str] = []
    for part in range(verdicts.parts):
        table = verdicts.read_part(part)
        if "selection" in table.column_names:
            asked = pa.array([str(Selection.ANNOTATE)])
            table = table.filter(pc.is_in(table["selection"], value_set=asked))
        wanted = [choice.correct] if choice.correct is not None else [True, False]
        kept: Any = table["rollout_id"].filter(pc.is_in(table["correct"], pa.array(wanted)))
        ids += kept.to_pylist()
    if choice.limit is not None:
        ids.sort(key=lambda one: sha256(f"{choice.seed} {one}".encode()).digest())
    return pa.array(ids[: choice.limit], pa.string())


def _items(verdicts: Dataset, ids: pa.Array) -> Iterator[Item]:
    """The rollouts with these ids that have a text, in the table's order."""
    rollouts = verdicts.input("rollouts")
    problems = rollouts.input("problems")
    for part in range(verdicts.parts):
        table = rollouts.read_part(part)
        table = table.filter(pc.is_in(table["rollout_id"], value_set=ids))
        made = items(problems.read_part(part), table, verdicts.read_part(part), SegmentConfig())
        yield from (item for item in made if item.response.strip())


def _task(
    item: Item, verdicts: str, hidden: set[str], marked: dict[str, Any] | None
) -> dict[str, Any]:
    content, nodes = response_html(item.response, item.segments)
    texts = {
        "history": _history(item.problem.get("history") or []),
        "problem": item.problem["problem"],
        "reference": _reference(item.problem),
        "verdict": "right: mark the key steps" if item.correct else "wrong: mark the error",
    }
    data = {
        "verdicts": verdicts,
        "rollout_id": item.rollout_id,
        "response_sha256": sha256(item.response.encode()).hexdigest(),
        **{name: shown(text) or _NONE for name, text in texts.items() if name not in hidden},
        "response": shown(item.response),
        RESPONSE: content,
    }
    task: dict[str, Any] = {"data": data}
    if marked is not None:
        result = [_region(span, nodes) for span in marked["spans"]]
        if marked["diagnostic_type"] is not None:
            chosen = {"choices": [marked["diagnostic_type"]]}
            result.append(_entry(TYPE, TYPE, "choices", chosen))
        task["predictions"] = [{"model_version": marked["annotator_name"], "result": result}]
    return task


def _history(turns: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _reference(problem: dict[str, Any]) -> str:
    answer = f"Final answer: {problem['answer']}"
    return f"{answer}\n{problem['solution']}" if problem["solution"] else answer


def _region(span: dict[str, Any], nodes: list[TextNode]) -> dict[str, Any]:
    """A span as a result of Label Studio."""
    start, end = span["start"], span["end"]
    first = next(node for node in nodes if node.end > start)
    last = next(node for node in reversed(nodes) if node.start < end)
    value = {
        "start": first.path,
        "startOffset": start - first.start,
        "end": last.path,
        "endOffset": end - last.start,
        "globalOffsets": {"start": start, "end": end},
        "text": shown(span["text"]),
        LABELS: [span["kind"]],
    }
    return _entry(f"span-{span['rank']}", MARKS, LABELS, value)


def _entry(id_: str, name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": id_, "from_name": name, "to_name": RESPONSE, "type": kind, "value": value}
