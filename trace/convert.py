"""Problems, rollouts, verdicts and annotations of one part to its routed table."""

import numpy as np
import pyarrow as pa

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import FinishReason, SpanKind
from ..schemas.tables import ROUTED
from .advantage import group_advantages
from .align import ByteTable
from .route import Routing, route_tokens

_COPIED = (
    "rollout_id", "problem_id", "group_id", "prompt_token_ids", "token_ids", "logprobs",
    "temperature", "policy_name", "policy_revision", "policy_step", "vocab_fingerprint",
)  # fmt: skip


def routed_table(
    problems: pa.Table,
    rollouts: pa.Table,
    verdicts: pa.Table,
    annotations: pa.Table | None,
    table: ByteTable,
    config: RoutingConfig,
) -> pa.Table:
    """The routed table of some rollouts; the other tables hold the same rollouts in order.

    Rollouts without a reward say nothing about the response: they leave their group before its
    advantages are formed. Off-policy rollouts (without the sampler's ids) are left out too.
    annotations: None means no spans, hence plain GRPO.

    Raises:
        InputError: tables that do not belong together, or a text that its tokens do not spell.
    """
    _same_rollouts(rollouts, verdicts, "verdicts")
    if annotations is not None:
        _same_rollouts(rollouts, annotations, "annotations")
    texts = dict(
        zip(problems["problem_id"].to_pylist(), problems["problem"].to_pylist(), strict=True)
    )
    judged = verdicts.to_pylist()
    marked = annotations.to_pylist() if annotations is not None else [None] * len(judged)
    kept = [
        (rollout, verdict, annotation)
        for rollout, verdict, annotation in zip(rollouts.to_pylist(), judged, marked, strict=True)
        if verdict["reward"] is not None and rollout["on_policy"] and rollout["token_ids"]
    ]
    rewards = np.array([verdict["reward"] for _, verdict, _ in kept], dtype=np.float64)
    groups = [rollout["group_id"] for rollout, _, _ in kept]
    advantages = group_advantages(rewards, groups, config.advantage_eps) if kept else []
    rows = []
    for (rollout, verdict, annotation), advantage in zip(kept, advantages, strict=True):
        routing = route_response(rollout, annotation, verdict["correct"], table, config)
        label = annotation["diagnostic_type"] if annotation is not None else None
        rows.append(
            {name: rollout[name] for name in _COPIED}
            | {
                "problem": texts[rollout["problem_id"]],
                "reward": verdict["reward"],
                "advantage": float(advantage),
                "correct": verdict["correct"],
                "truncated": rollout["finish_reason"] == FinishReason.LENGTH,
                "route": routing.route,
                "span_id": routing.span_id,
                "diagnostic_type": label if (routing.span_id >= 0).any() else None,
                "coverage": routing.coverage,
                "dropped_tokens": routing.dropped_tokens,
            }
        )
    return ROUTED.table(rows)


def route_response(
    rollout: dict, annotation: dict | None, correct: bool, table: ByteTable, config: RoutingConfig
) -> Routing:
    """Align one response's segments to its tokens and route them."""
    token_ids = rollout["token_ids"]
    if table.text(token_ids) != rollout["response"]:
        raise InputError(
            f"rollout {rollout['rollout_id']}: token_ids do not spell the response under this "
            "tokenizer; convert with the policy that sampled it"
        )
    spans = annotation["spans"] if annotation is not None else []
    if not spans:
        none = np.full(len(token_ids), -1)
        return route_tokens(none, [], SpanKind.KEY, config)
    segments = [(segment["start"], segment["end"]) for segment in annotation["segments"]]  # type: ignore[index]
    token_segment = table.token_segments(token_ids, segments)
    kind = SpanKind.KEY if correct else SpanKind.ERROR
    return route_tokens(token_segment, [span["segments"] for span in spans], kind, config)


def _same_rollouts(rollouts: pa.Table, other: pa.Table, name: str) -> None:
    if rollouts["rollout_id"].to_pylist() != other["rollout_id"].to_pylist():
        raise InputError(
            f"{name}: rollout_id does not match the rollouts row for row; run that stage again"
        )
