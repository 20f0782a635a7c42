"""Problems, rollouts, verdicts and annotations of one part to its routed table."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route
from ..schemas.tables import ROUTED
from .advantage import scored_rollouts, truncated
from .align import ByteTable
from .context import TeacherContexts, teacher_contexts
from .ragged import lists_of, one_chunk, rows_of, to_numpy
from .responses import aligned
from .route import Routing, route_responses

_COPIED = (
    "rollout_id", "problem_id", "group_id", "prompt_token_ids", "token_ids", "logprobs",
    "temperature", "policy_name", "policy_revision", "policy_step", "vocab_fingerprint",
)  # fmt: skip
_READ = [*_COPIED, "response", "sample_index", "finish_reason"]
_MARKS = ["segments", "spans", "diagnostic_type"]
# Tokens whose bytes are in memory at once; few enough for a core's cache.
_BLOCK_TOKENS = 1 << 18


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
        InputError: tables that do not belong together, a text that its tokens do not spell, or
            segments that do not tile it.
    """
    _same_rollouts(rollouts, verdicts, "verdicts")
    if annotations is not None:
        _same_rollouts(rollouts, annotations, "annotations")
    scored = scored_rollouts(rollouts, verdicts, config)
    rollouts = rows_of(rollouts.select(_READ), scored.rows)
    verdicts = rows_of(verdicts.select(["correct"]), scored.rows)
    labels = pa.nulls(len(rollouts), pa.string())
    if annotations is not None:
        annotations = rows_of(annotations.select(_MARKS), scored.rows)
        labels = one_chunk(annotations["diagnostic_type"])
    problems = _problems_of(rollouts, problems)
    correct = to_numpy(pc.is_in(verdicts["correct"], value_set=pa.array([True])))
    contexts = teacher_contexts(rollouts, problems, correct, labels, config)
    offsets = _token_offsets(rollouts)
    taught = contexts.exists & with_teacher
    routings = [
        route_responses(
            aligned(
                rollouts[rows],
                annotations[rows] if annotations is not None else None,
                correct[rows],
                table,
                config.alpha,
            ),
            taught[rows],
            config,
        )
        for rows in _blocks(offsets)
    ]
    columns = {name: rollouts[name] for name in _COPIED} | {
        "problem": problems["problem"],
        "reward": pa.array(scored.rewards.astype(np.float32)),
        "advantage": pa.array(scored.advantages),
        "correct": verdicts["correct"],
        "truncated": pa.array(truncated(rollouts)),
        **_labels(routings, offsets, contexts),
    }
    arrays = [columns[name] for name in ROUTED.schema.names]
    return pa.Table.from_arrays(arrays, schema=ROUTED.schema)


def _same_rollouts(rollouts: pa.Table, other: pa.Table, name: str) -> None:
    if not rollouts["rollout_id"].equals(other["rollout_id"]):
        raise InputError(
            f"{name}: rollout_id does not match the rollouts row for row; run that stage again"
        )


def _problems_of(rollouts: pa.Table, problems: pa.Table) -> pa.Table:
    """The problem of each rollout.

    Raises:
        InputError: a problem that is not in the table.
    """
    ids = one_chunk(problems["problem_id"])
    places: Any = one_chunk(pc.index_in(rollouts["problem_id"], value_set=ids))
    if places.null_count:
        row = pc.index(places.is_null(), True).as_py()
        raise InputError(
            f"rollout {rollouts['rollout_id'][row]}: problem {rollouts['problem_id'][row]} is not "
            "in the problems table; convert with the problems that were sampled from"
        )
    return problems.select(["problem", "answer", "solution"]).take(places)


def _token_offsets(rollouts: pa.Table) -> np.ndarray:
    lengths = to_numpy(pc.list_value_length(rollouts["token_ids"]))
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _blocks(offsets: np.ndarray) -> Iterator[slice]:
    """Runs of rows of at most _BLOCK_TOKENS tokens, or of one row."""
    first, rows = 0, len(offsets) - 1
    while first < rows:
        end = int(np.searchsorted(offsets, offsets[first] + _BLOCK_TOKENS, side="right")) - 1
        end = max(end, first + 1)
        yield slice(first, end)
        first = end


def _labels(
    routings: list[Routing], offsets: np.ndarray, contexts: TeacherContexts
) -> dict[str, pa.Array]:
    """What the routed table says of tokens, and what the teacher of a response is told."""
    route = _joined((one.route for one in routings), np.uint8)
    span_id = _joined((one.span_id for one in routings), np.int16)
    coverage = _joined((one.coverage for one in routings), np.float32)
    dropped = _joined((one.dropped_tokens for one in routings), np.int32)
    routed = np.bitwise_or.reduceat(route, offsets[:-1]) != int(Route.GRPO)
    return {
        "route": lists_of(route, offsets),
        "span_id": lists_of(span_id, offsets),
        "diagnostic_type": _where(coverage > 0, contexts.labels),
        "teacher_context": _where(routed, contexts.texts),
        "coverage": pa.array(coverage),
        "dropped_tokens": pa.array(dropped),
    }


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="same_kind")


def _where(mask: np.ndarray, texts: pa.Array) -> pa.Array:
    return pc.if_else(pa.array(mask), texts, pa.scalar(None, pa.string()))
