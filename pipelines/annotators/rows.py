"""What an annotator works on, and how its marks become rows of the annotations table.

Called by all engines, and by online training for rollouts that no annotator is asked about.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.configs import SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus, Selection, SpanKind, TypeLabel
from ...schemas.tables import ANNOTATIONS
from ...trace.segment import segment
from ..paid.questions import Usage

# Begins the error of a failed row that another attempt may mend: time-outs, server errors.
NO_ANSWER = "unanswered: "


@dataclass(frozen=True)
class Item:
    """One rollout to annotate: problem row, response cut into segments, whether it is right.

    correct: None if no annotator is asked about it; verdict: whether it is right all the same.
    """

    rollout_id: str
    problem_id: str
    group_id: str
    problem: dict[str, Any]
    response: str
    segments: list[tuple[int, int]]
    correct: bool | None
    verdict: bool | None = None

    @property
    def kind(self) -> SpanKind:
        return SpanKind.KEY if self.correct else SpanKind.ERROR

    def text(self, index: int) -> str:
        start, end = self.segments[index]
        return self.response[start:end]


@dataclass(frozen=True)
class Reading:
    """An annotator's answer: segment indices per span, most important first, and one type.

    type: of DiagnosticType, or of ErrorType for a wrong response. reflection: what to do
    differently, about a wrong response.
    """

    status: AnnotationStatus
    marked: list[list[int]] = field(default_factory=list)
    type: TypeLabel | None = None
    error: str | None = None
    reflection: str | None = None


@dataclass(frozen=True)
class Identity:
    """The annotator: the config's name, the model behind it, the prompt's version.

    reflects: whether it is asked for reflections, so that its rows have that column.
    """

    name: str
    model: str
    prompt_version: str = ""
    reflects: bool = False


SKIPPED = Reading(AnnotationStatus.SKIPPED)


def items(
    problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table, config: SegmentConfig
) -> Iterator[Item]:
    """The rollouts of one part, in order; `verdicts` holds the same rollouts in the same order.

    Segmenting is lazy: an endpoint works on the first rows meanwhile.

    Raises:
        InputError: tables that do not belong together, before the first item.
    """
    by_id = {row["problem_id"]: row for row in problems.to_pylist()}
    verdict = verdicts["correct"].to_pylist()
    judged = dict(zip(verdicts["rollout_id"].to_pylist(), verdict, strict=True))
    unselected: set[Any] = set()
    if "selection" in verdicts.column_names:
        asked = pc.is_in(verdicts["selection"], value_set=pa.array([str(Selection.ANNOTATE)]))
        unselected.update(verdicts["rollout_id"].filter(pc.invert(asked)).to_pylist())
    columns = ["rollout_id", "problem_id", "group_id", "response"]
    rows = rollouts.select(columns).to_pylist()
    for index, row in enumerate(rows):
        for name, known in (("rollout_id", judged), ("problem_id", by_id)):
            if row[name] not in known:
                table = "verdicts" if name == "rollout_id" else "problems"
                raise InputError(
                    f"rollouts, row {index}: {name} {row[name]} is not in the {table}; make both "
                    "again"
                )
    for row in rows:
        yield Item(
            **row,
            problem=by_id[row["problem_id"]],
            segments=segment(row["response"], config),
            correct=None if row["rollout_id"] in unselected else judged[row["rollout_id"]],
            verdict=judged[row["rollout_id"]],
        )


def skipped_annotations(
    problems: pa.Table,
    rollouts: pa.Table,
    verdicts: pa.Table,
    config: SegmentConfig | None = None,
) -> pa.Table:
    """Annotations of rollouts that no annotator is asked about: where routing reads none, and in
    online steps once λ is 0."""
    nobody = Identity("none", "none")
    work = items(problems, rollouts, verdicts, config or SegmentConfig())
    return ANNOTATIONS.table(annotation_row(item, nobody, SKIPPED) for item in work)


def annotation_row(
    item: Item,
    who: Identity,
    reading: Reading,
    usage: Usage | None = None,
    raw_answer: str | None = None,
) -> dict[str, Any]:
    """One row of the annotations table."""
    usage = usage or Usage()
    return {
        "rollout_id": item.rollout_id,
        "problem_id": item.problem_id,
        "group_id": item.group_id,
        "correct": item.correct if item.verdict is None else item.verdict,
        "segments": [{"start": start, "end": end} for start, end in item.segments],
        "spans": spans(item, reading.marked),
        "diagnostic_type": reading.type,
        "status": reading.status,
        "annotator_name": who.name,
        "annotator_model": who.model,
        "prompt_version": who.prompt_version,
        "raw_answer": raw_answer,
        "error": reading.error,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost_usd": usage.cost_usd,
        "latency_s": usage.latency_s,
    } | ({"reflection": reading.reflection} if who.reflects else {})


def spans(item: Item, marked: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Spans of consecutive segments; their rank is their place in the list.

    Indices that are not consecutive make several spans, in the order in which they are named.
    """
    runs = [run for named in marked for run in _consecutive(named)]
    out = []
    for rank, run in enumerate(runs):
        start, end = item.segments[run[0]][0], item.segments[run[-1]][1]
        out.append(
            {
                "segments": run,
                "kind": item.kind,
                "rank": rank,
                "start": start,
                "end": end,
                "text": item.response[start:end],
            }
        )
    return out


def _consecutive(named: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in sorted(set(named)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return sorted(runs, key=lambda run: min(named.index(i) for i in run))
