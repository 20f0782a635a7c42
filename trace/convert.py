"""Problems, rollouts, verdicts and annotations of one part to its routed table."""

from typing import Any

import numpy as np
import pyarrow as pa

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import SpanKind
from ..schemas.tables import ROUTED
from .advantage import Scored, scored_rollouts
from .align import ByteTable
from .context import teacher_contexts
from .route import route_tokens, unrouted
from .rules import Response

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
    with_teacher: bool = True,
) -> pa.Table:
    """The routed table of those rollouts that `scored_rollouts` keeps; the other tables hold the
    same rollouts in order.

    A response without its teacher's context is plain GRPO, and so is every one where there is no
    teacher (λ is 0). annotations: None means no spans and no type labels.

    Raises:
        InputError: tables that do not belong together, or a text that its tokens do not spell.
    """
    _same_rollouts(rollouts, verdicts, "verdicts")
    if annotations is not None:
        _same_rollouts(rollouts, annotations, "annotations")
    by_id = {row["problem_id"]: row for row in problems.to_pylist()}
    scored = scored_rollouts(rollouts, verdicts, config)
    if annotations is None:
        marked = [None] * len(scored)
    else:
        marked = annotations.take(pa.array([one.row for one in scored], pa.int64())).to_pylist()
    labels = [row["diagnostic_type"] if row is not None else None for row in marked]
    contexts = teacher_contexts(scored, by_id, labels, config)
    rows = []
    for one, annotation, context in zip(scored, marked, contexts, strict=True):
        response = response_of(one, annotation, table, config.alpha)
        taught = with_teacher and context is not None
        routing = route_tokens(response, config) if taught else unrouted(response)
        label = context.label if context is not None and (routing.span_id >= 0).any() else None
        text = context.text if context is not None and routing.route.any() else None
        rows.append(
            {name: one.rollout[name] for name in _COPIED}
            | {
                "problem": by_id[one.rollout["problem_id"]]["problem"],
                "reward": one.reward,
                "advantage": one.advantage,
                "correct": one.correct,
                "truncated": one.truncated,
                "route": routing.route,
                "span_id": routing.span_id,
                "diagnostic_type": label,
                "teacher_context": text,
                "coverage": routing.coverage,
                "dropped_tokens": routing.dropped_tokens,
            }
        )
    return ROUTED.table(rows)


def response_of(
    scored: Scored, annotation: dict[str, Any] | None, table: ByteTable, alpha: float
) -> Response:
    """What a rule may see of a rollout, its segments aligned to its tokens.

    Raises:
        InputError: a text that its tokens do not spell.
    """
    rollout = scored.rollout
    token_ids = rollout["token_ids"]
    if table.text(token_ids) != rollout["response"]:
        raise InputError(
            f"rollout {rollout['rollout_id']}: token_ids do not spell the response under this "
            "tokenizer; convert with the policy that sampled it"
        )
    token_segment, spans = np.full(len(token_ids), -1), []
    if annotation is not None and annotation["segments"]:
        segments = [(segment["start"], segment["end"]) for segment in annotation["segments"]]
        token_segment = table.token_segments(token_ids, segments)
        spans = [span["segments"] for span in annotation["spans"]]
    return Response(
        rollout_id=rollout["rollout_id"],
        token_ids=np.array(token_ids, dtype=np.int64),
        logprobs=np.array(rollout["logprobs"], dtype=np.float32),
        token_segment=token_segment,
        spans=spans,
        kind=SpanKind.KEY if scored.correct else SpanKind.ERROR,
        alpha=alpha,
    )


def _same_rollouts(rollouts: pa.Table, other: pa.Table, name: str) -> None:
    if rollouts["rollout_id"].to_pylist() != other["rollout_id"].to_pylist():
        raise InputError(
            f"{name}: rollout_id does not match the rollouts row for row; run that stage again"
        )
