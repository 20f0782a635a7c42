"""A rollout with all that the stages say of it, joined and ready to be drawn."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.store import Dataset, Store
from ..schemas.errors import InputError
from ..schemas.tables import ANNOTATIONS, ROUTED
from ..trace.align import ByteTable, byte_table
from ..trace.policy import load_tokenizer, vocab_fingerprint
from .models import resolve_policy
from .paint import (
    CharPaint,
    Piece,
    paint_kept_spans,
    paint_spans,
    paint_tokens,
    pieces,
    visible,
)

logger = logging.getLogger(__name__)

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
    """One marked span; kept_tokens is None where nothing is routed."""

    rank: int
    kind: str
    segments: list[int]
    kept_tokens: int | None


@dataclass(frozen=True)
class RolloutView:
    """What is drawn of one rollout. Texts are made `visible`; None: not known of this rollout.

    exact: whether the paint is exact per token, not estimated from spans.
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


@dataclass(frozen=True)
class Tables:
    """A dataset of rollouts and the tables behind it, by role, the most processed one first."""

    by_role: dict[str, Dataset]

    @property
    def lead(self) -> Dataset:
        return next(iter(self.by_role.values()))


def find_tables(dataset: Dataset, store: Store) -> Tables:
    """The tables that tell a dataset's rollouts.

    dataset: routed, annotations, or a train run: its online tables, or if it has none the routed
    table that it was trained on.

    Raises:
        InputError: the dataset is of none of these kinds.
    """
    if dataset.stage == "train":
        refs = dataset.summary.get("tables") or {"routed": dataset.manifest["inputs"]["routed"]}
        found = {role: store.get(ref) for role, ref in refs.items()}
    elif dataset.contract is ROUTED:
        found = {"routed": dataset}
    elif dataset.contract is ANNOTATIONS:
        found = {"annotations": dataset}
    else:
        raise InputError(
            f"dataset {dataset.ref} holds {dataset.manifest['table'] or 'no table'}; give a routed "
            "or an annotations dataset, or a train run"
        )
    ordered: dict[str, Dataset] = {}
    for role in _COLUMNS:
        made_from = [known for known in ordered.values() if role in known.manifest["inputs"]]
        if role in found:
            ordered[role] = found[role]
        elif made_from:
            ordered[role] = made_from[0].input(role)
    return Tables(ordered)


def find_byte_table(dataset: Dataset, tables: Tables) -> tuple[ByteTable, str] | None:
    """Bytes per token id and the vocabulary's fingerprint, if the policy is on this machine."""
    rollouts = tables.by_role["rollouts"]
    configs = [dataset.manifest["config"], rollouts.manifest["config"]]
    if (online := rollouts.manifest["config"].get("online")) is not None:
        # Sampled in training: the run's config tells the policy, once the run is finished.
        run = dataset.store.find(*online.split("/"))
        configs += [run.manifest["config"]] if run is not None else []
    paths = [config["policy"]["path"] for config in configs if "policy" in config]
    if not paths:
        return None
    try:
        folder = resolve_policy(paths[0])
        if not Path(folder).is_dir():
            return None
        tokenizer = load_tokenizer(folder)
        return byte_table(tokenizer), vocab_fingerprint(tokenizer)
    except InputError as error:
        logger.info("painting by spans, not tokens: %s", error)
        return None


def choose_groups(lead: Dataset, limit: int) -> list[str]:
    """Rollout ids of whole groups, evenly spread over the dataset, about `limit` at most."""
    table = lead.read(["rollout_id", "group_id"])
    groups: dict[str, list[str]] = {}
    for rollout_id, group_id in zip(*(column.to_pylist() for column in table), strict=True):
        groups.setdefault(group_id, []).append(rollout_id)
    everything = list(groups.values())
    count = min(len(everything), max(1, limit * len(everything) // max(1, len(table))))
    spread = [everything[i * len(everything) // count] for i in range(count)] if count else []
    return [rollout_id for group in spread for rollout_id in group][:limit]


def load_rollouts(
    tables: Tables, ids: Sequence[str], bytes_of: tuple[ByteTable, str] | None
) -> list[RolloutView]:
    """The rollouts of some ids, by policy step, then problem, then sample."""
    rows = {
        role: _rows(dataset, "rollout_id", ids, _COLUMNS[role])
        for role, dataset in tables.by_role.items()
        if role != "problems"
    }
    rollouts = rows["rollouts"]
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
    bytes_of: tuple[ByteTable, str] | None,
) -> RolloutView:
    annotation = annotation or {"segments": [], "spans": []}
    spans, segments = annotation["spans"], annotation["segments"]
    exact = bytes_of is not None and bytes_of[1] == rollout["vocab_fingerprint"]
    painted = _paint(rollout, annotation, routed, bytes_of[0] if bytes_of and exact else None)
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
        exact=exact or not spans or routed is None,
        spans=[
            SpanView(
                rank=span["rank"],
                kind=span["kind"],
                segments=span["segments"],
                kept_tokens=int(np.count_nonzero(routed["span_id"] == span["rank"]))
                if routed
                else None,
            )
            for span in spans
        ],
        pieces=pieces(rollout["response"], segments, painted),
    )


def _paint(
    rollout: dict, annotation: dict, routed: dict | None, table: ByteTable | None
) -> CharPaint:
    length, spans = len(rollout["response"]), annotation["spans"]
    segments = annotation["segments"]
    if routed is None:
        return paint_spans(length, spans)
    route, span_id = routed["route"], routed["span_id"]
    if table is None:
        return paint_kept_spans(length, segments, spans, route, span_id, routed["dropped_tokens"])
    return paint_tokens(
        table, length, segments, spans, rollout["token_ids"].tolist(), route, span_id
    )


def _visible(text: str | None) -> str | None:
    return None if text is None else visible(text)
