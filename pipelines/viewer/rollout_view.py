"""Joins what all stages recorded about a rollout and makes it ready to draw.

view.py and report_page.py send it to the page as JSON; `trace-opd show` prints it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ...data.store import Dataset
from ...schemas.conversation import shown_row
from ...trace.align import ByteTable
from ...trace.vocabulary import Vocabulary
from ..terminal import visible
from .paint import (
    CharPaint,
    Piece,
    paint_even_tokens,
    paint_kept_spans,
    paint_spans,
    paint_tokens,
    pieces,
)
from .rollout_index import build_index
from .rollout_tables import Tables, routing_rule
from .row_reader import RowReader
from .side_by_side import ComparedPiece, compare_marks

_COLUMNS = {
    "routed": (
        "rollout_id", "route", "span_id", "advantage", "coverage", "dropped_tokens",
        "diagnostic_type",
    ),
    "annotations": (
        "rollout_id", "segments", "spans", "diagnostic_type", "status", "annotator_name",
        "raw_answer", "error", "reflection",
    ),
    "verdicts": (
        "rollout_id", "reward", "correct", "parsed_answer", "status", "feedback", "grades",
        "parts", "selection", "left_out",
    ),
    "rollouts": (
        "rollout_id", "problem_id", "group_id", "sample_index", "token_ids", "response",
        "finish_reason", "policy_name", "policy_step", "vocab_fingerprint",
    ),
    "problems": ("problem_id", "problem", "answer", "source", "history"),
}  # fmt: skip
_NO_ANNOTATION: dict[str, Any] = {"segments": [], "spans": []}


@dataclass(frozen=True)
class SpanView:
    """One marked span; kept_tokens: how many the cap kept, None unless the rule is spans."""

    rank: int
    kind: str
    segments: list[int]
    kept_tokens: int | None


@dataclass(frozen=True)
class PartView:
    """A part of the reward. value: None if it has none, for which the status is the reason."""

    name: str
    value: float | None
    status: str


@dataclass(frozen=True)
class SideView:
    """One of two annotators' answers: its row of the annotations table, and the response in pieces
    of equal agreement. None: the annotator has no row, or an empty field."""

    annotator: str | None
    status: str | None
    raw: str | None
    error: str | None
    reflection: str | None
    type: str | None
    spans: list[SpanView]
    pieces: list[ComparedPiece]


@dataclass(frozen=True)
class RolloutView:
    """One rollout as it is drawn. Texts are made `visible`; None: unknown for this rollout.

    exact: whether the paint is exact per token, not an estimate. sides: the two annotators of a
    comparison, else empty; the other fields are then the first annotator's.
    """

    id: str
    problem_id: str
    problem: str
    answer: str
    source: str
    group: str
    sample: int
    policy: str
    step: int
    tokens: int | None
    finish: str
    reward: float | None
    correct: bool | None
    parsed: str | None
    verdict: str
    parts: list[PartView]
    feedback: str | None
    grades: str | None
    selection: str | None
    annotator: str | None
    status: str | None
    raw: str | None
    error: str | None
    reflection: str | None
    type: str | None
    advantage: float | None
    coverage: float | None
    dropped: int | None
    exact: bool
    spans: list[SpanView]
    pieces: list[Piece]
    sides: list[SideView]


class RolloutReader:
    """Reads rollouts by row number and paints them. Thread-safe."""

    def __init__(
        self,
        tables: Tables,
        vocabulary: Vocabulary | None = None,
        against: Dataset | None = None,
    ) -> None:
        datasets = tables.by_role | ({"against": against} if against is not None else {})
        self._readers = {
            role: RowReader(dataset, _COLUMNS["annotations" if role == "against" else role])
            for role, dataset in datasets.items()
        }
        self._rule = routing_rule(tables)
        self._vocabulary = vocabulary

    def read(self, rows: Mapping[str, np.ndarray]) -> list[RolloutView]:
        """Rollouts by their row number in the table of each role; −1 if the table has no row."""
        found = {role: reader.rows(rows[role]) for role, reader in self._readers.items()}
        return [
            _view({role: column[i] for role, column in found.items()}, self._rule, self._vocabulary)
            for i in range(len(rows["rollouts"]))
        ]


def rollout_data(view: RolloutView) -> dict[str, Any]:
    """A rollout as the page draws it, as JSON-able data."""
    row: dict[str, Any] = vars(view) | {"spans": [vars(span) for span in view.spans]}
    row["parts"] = [vars(part) for part in view.parts]
    row["sides"] = [vars(side) | {"spans": [vars(s) for s in side.spans]} for side in view.sides]
    row["problem"] = {name: row.pop(name) for name in ("problem", "answer", "source")}
    if view.sides:  # they hold the response and the first annotator's answer too
        for field in fields(SideView):
            del row[field.name]
    return row


def load_rollouts(
    tables: Tables, ids: Sequence[str], vocabulary: Vocabulary | None
) -> list[RolloutView]:
    """The rollouts with these ids, by policy step, then group, then sample."""
    return RolloutReader(tables, vocabulary).read(build_index(tables, ids=ids).rows)


def _view(row: dict[str, Any], rule: str, vocabulary: Vocabulary | None) -> RolloutView:
    """row: the rollout's row in each table by role; None if a table has no row."""
    rollout, verdict, problem = row["rollouts"], row["verdicts"], row["problems"]
    # Online steps without a KL term are not annotated.
    annotation = row.get("annotations") or _NO_ANNOTATION
    routed = row.get("routed")
    spans, segments = annotation["spans"], annotation["segments"]
    known = vocabulary is not None and vocabulary.fingerprint == rollout["vocab_fingerprint"]
    table = vocabulary.pieces if vocabulary and known else None
    painted = _paint(rollout, annotation, routed, rule, table)
    return RolloutView(
        id=rollout["rollout_id"],
        problem_id=rollout["problem_id"],
        problem=visible(shown_row(problem)),
        answer=visible(problem["answer"]),
        source=visible(problem["source"]),
        group=rollout["group_id"],
        sample=rollout["sample_index"],
        policy=visible(rollout["policy_name"]),
        step=rollout["policy_step"],
        tokens=len(rollout["token_ids"]) or None,
        finish=rollout["finish_reason"],
        reward=verdict["reward"],
        correct=verdict["correct"],
        parsed=_visible(verdict["parsed_answer"]),
        verdict=verdict["status"],
        parts=[
            PartView(visible(part["name"]), part["value"], part["status"])
            for part in verdict.get("parts") or ()
        ],
        feedback=_visible(verdict.get("feedback")),
        grades=_visible(_grades(verdict.get("grades") or [])),
        selection=_selection(verdict),
        annotator=_visible(annotation.get("annotator_name")),
        status=annotation.get("status"),
        raw=_visible(annotation.get("raw_answer")),
        error=_visible(annotation.get("error")),
        reflection=_visible(annotation.get("reflection")),
        type=annotation.get("diagnostic_type"),
        advantage=routed["advantage"] if routed else None,
        coverage=routed["coverage"] if routed else None,
        dropped=routed["dropped_tokens"] if routed else None,
        exact=known or routed is None or _needs_no_offsets(routed["route"], spans),
        spans=_spans(annotation, routed["span_id"] if routed and rule == "spans" else None),
        pieces=pieces(rollout["response"], segments, painted),
        sides=_sides(rollout["response"], annotation, row["against"] or _NO_ANNOTATION)
        if "against" in row
        else [],
    )


def _grades(grades: Sequence[dict]) -> str | None:
    """A line for each grade that judges gave: the grade, or why there is none, and the reason."""
    lines = []
    for one in grades:
        found = one["status"] if one["grade"] is None else one["grade"]
        order = one["order"].replace("_", " ")
        reason = f": {one['reason']}" if one["reason"] else ""
        lines.append(f"{one['name']}, {order}, repeat {one['repeat']}: {found}{reason}")
    return "\n".join(lines) or None


def _sides(response: str, first: dict, second: dict) -> list[SideView]:
    return [
        SideView(
            annotator=_visible(annotation.get("annotator_name")),
            status=annotation.get("status"),
            raw=_visible(annotation.get("raw_answer")),
            error=_visible(annotation.get("error")),
            reflection=_visible(annotation.get("reflection")),
            type=annotation.get("diagnostic_type"),
            spans=_spans(annotation, None),
            pieces=drawn,
        )
        for annotation, drawn in zip(
            (first, second), compare_marks(response, first, second), strict=True
        )
    ]


def _spans(annotation: dict, span_id: np.ndarray | None) -> list[SpanView]:
    """span_id: (tokens,) of the routed table under rule spans, else None."""
    return [
        SpanView(
            rank=span["rank"],
            kind=span["kind"],
            segments=span["segments"],
            kept_tokens=None if span_id is None else int(np.count_nonzero(span_id == span["rank"])),
        )
        for span in annotation["spans"]
    ]


def _paint(
    rollout: dict, annotation: dict, routed: dict | None, rule: str, table: ByteTable | None
) -> CharPaint:
    length, spans = len(rollout["response"]), annotation["spans"]
    segments = annotation["segments"]
    if routed is None:
        return paint_spans(length, spans)
    route, span_id = routed["route"], routed["span_id"]
    if table is not None:
        token_ids = rollout["token_ids"].tolist()
        return paint_tokens(table, length, segments, spans, token_ids, route, span_id)
    if rule == "spans":
        return paint_kept_spans(length, segments, spans, route, span_id, routed["dropped_tokens"])
    return paint_even_tokens(length, spans, route, span_id)


def _needs_no_offsets(route: np.ndarray, spans: Sequence[dict]) -> bool:
    """Whether no offset can change the paint: one route for all tokens, no span visible in it."""
    return len(np.unique(route)) <= 1 and (bool(route.any()) or not spans)


def _selection(verdict: dict[str, Any]) -> str | None:
    """What becomes of the rollout after stage select, and why it is not selected."""
    if (selection := verdict.get("selection")) is None:
        return None
    return selection if verdict["left_out"] is None else f"{selection} ({verdict['left_out']})"


def _visible(text: str | None) -> str | None:
    return None if text is None else visible(text)
