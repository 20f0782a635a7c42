"""A rollout with all that the stages say of it, joined and ready to be drawn."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.store import Dataset
from ..trace.align import ByteTable
from .paint import (
    CharPaint,
    Piece,
    paint_even_tokens,
    paint_kept_spans,
    paint_spans,
    paint_tokens,
    pieces,
    visible,
)
from .rollout_tables import Tables, routing_rule

_COLUMNS = {
    "routed": (
        "rollout_id", "route", "span_id", "advantage", "coverage", "dropped_tokens",
        "diagnostic_type",
    ),
    "annotations": (
        "rollout_id", "segments", "spans", "diagnostic_type", "status", "annotator_name",
        "raw_answer", "error",
    ),
    "verdicts": ("rollout_id", "reward", "correct", "parsed_answer", "status"),
    "rollouts": (
        "rollout_id", "problem_id", "group_id", "sample_index", "token_ids", "response",
        "finish_reason", "policy_name", "policy_step", "vocab_fingerprint",
    ),
    "problems": ("problem_id", "problem", "answer", "source"),
}  # fmt: skip
_TOKEN_COLUMNS = ("token_ids", "route", "span_id")


@dataclass(frozen=True)
class SpanView:
    """One marked span; kept_tokens: how many the cap let through, None but under rule spans."""

    rank: int
    kind: str
    segments: list[int]
    kept_tokens: int | None


@dataclass(frozen=True)
class RolloutView:
    """What is drawn of one rollout. Texts are made `visible`; None: not known of this rollout.

    exact: whether the paint is exact per token, not an estimate.
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
    annotator: str | None
    status: str | None
    raw: str | None
    error: str | None
    type: str | None
    advantage: float | None
    coverage: float | None
    dropped: int | None
    exact: bool
    spans: list[SpanView]
    pieces: list[Piece]


def load_rollouts(
    tables: Tables, ids: Sequence[str], bytes_of: tuple[ByteTable, str] | None
) -> list[RolloutView]:
    """The rollouts of some ids, by policy step, then problem, then sample."""
    rows = {
        role: _rows(dataset, "rollout_id", ids, _COLUMNS[role])
        for role, dataset in tables.by_role.items()
        if role != "problems"
    }
    rollouts, rule = rows["rollouts"], routing_rule(tables)
    problems = _rows(
        tables.by_role["problems"],
        "problem_id",
        {rollout["problem_id"] for rollout in rollouts.values()},
        _COLUMNS["problems"],
    )
    views = [
        _view(
            rollouts[rollout_id],
            rows["verdicts"][rollout_id],
            # Online steps without a KL are not annotated.
            rows.get("annotations", {}).get(rollout_id),
            rows.get("routed", {}).get(rollout_id),
            problems[rollouts[rollout_id]["problem_id"]],
            rule,
            bytes_of,
        )
        for rollout_id in ids
    ]
    order = {group: index for index, group in enumerate(Counter(view.group for view in views))}
    return sorted(views, key=lambda view: (view.step, order[view.group], view.sample))


def _rows(
    dataset: Dataset, key: str, ids: Iterable[str], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Rows of some ids by id, read part by part; per-token columns as numpy arrays."""
    wanted = pa.array(list(ids), pa.string())
    found: dict[str, dict[str, Any]] = {}
    for part in range(dataset.parts):
        table = dataset.read_part(part, columns)
        table = table.filter(pc.is_in(table[key], value_set=wanted))
        per_token = [name for name in columns if name in _TOKEN_COLUMNS]
        rows = table.drop_columns(per_token).to_pylist()
        for name in per_token:
            for row, value in zip(rows, table[name], strict=True):
                row[name] = value.values.to_numpy()
        found |= {row[key]: row for row in rows}
    return found


def _view(
    rollout: dict,
    verdict: dict,
    annotation: dict | None,
    routed: dict | None,
    problem: dict,
    rule: str,
    bytes_of: tuple[ByteTable, str] | None,
) -> RolloutView:
    annotation = annotation or {"segments": [], "spans": []}
    spans, segments = annotation["spans"], annotation["segments"]
    known = bytes_of is not None and bytes_of[1] == rollout["vocab_fingerprint"]
    table = bytes_of[0] if bytes_of and known else None
    painted = _paint(rollout, annotation, routed, rule, table)
    return RolloutView(
        id=rollout["rollout_id"],
        problem_id=rollout["problem_id"],
        problem=visible(problem["problem"]),
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
        annotator=_visible(annotation.get("annotator_name")),
        status=annotation.get("status"),
        raw=_visible(annotation.get("raw_answer")),
        error=_visible(annotation.get("error")),
        type=annotation.get("diagnostic_type"),
        advantage=routed["advantage"] if routed else None,
        coverage=routed["coverage"] if routed else None,
        dropped=routed["dropped_tokens"] if routed else None,
        exact=known or routed is None or _looks_the_same_everywhere(routed["route"], spans),
        spans=[
            SpanView(
                rank=span["rank"],
                kind=span["kind"],
                segments=span["segments"],
                kept_tokens=int(np.count_nonzero(routed["span_id"] == span["rank"]))
                if routed and rule == "spans"
                else None,
            )
            for span in spans
        ],
        pieces=pieces(rollout["response"], segments, painted),
    )


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


def _looks_the_same_everywhere(route: np.ndarray, spans: Sequence[dict]) -> bool:
    """Whether no offset could move the paint: all tokens on one route, no span shining through."""
    return len(np.unique(route)) <= 1 and (bool(route.any()) or not spans)


def _visible(text: str | None) -> str | None:
    return None if text is None else visible(text)
