"""From problems, rollouts, verdicts and annotations of one part to its routed table.

Stage convert and online.py call `routed_table`. It selects the rollouts to train on, turns verdicts
into rewards and group-normalised advantages, and routes tokens block by block (responses.py).
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.contract import list_of
from ..schemas.conversation import with_history
from ..schemas.errors import InputError, RowFault
from ..schemas.labels import FinishReason, Route, Selection, TeacherContext
from ..schemas.tables import ROUTED
from .align import ByteTable
from .contexts import Known, TeacherContexts, teacher_contexts
from .policy_mask import POLICY_MASK, flat_mask, policy_lengths, policy_scores, route_written
from .responses import aligned, one_chunk, to_numpy
from .route import Routing, require_scores

_COPIED = (
    "rollout_id", "problem_id", "group_id", "prompt_token_ids", "token_ids", "logprobs",
    "temperature", "policy_name", "policy_revision", "policy_step", "vocab_fingerprint",
)  # fmt: skip
_READ = [*_COPIED, "response", "sample_index", "finish_reason"]
_ANNOTATED = ["segments", "spans", "diagnostic_type"]
# The teacher context reflection: outside TRACE's boundary. No other context reads it.
_REFLECTION = "reflection"
# Tokens per block; few enough that their bytes fit a core's cache.
_BLOCK_TOKENS = 1 << 18


def routed_table(
    problems: pa.Table,
    rollouts: pa.Table,
    verdicts: pa.Table,
    annotations: pa.Table | None,
    table: ByteTable,
    config: RoutingConfig,
    with_teacher: bool = True,
    scores: pa.Table | None = None,
) -> pa.Table:
    """The routed table of the rollouts that `scored_rollouts` keeps.

    rollouts, verdicts, annotations: the same rollouts row by row. annotations None: no spans and no
    type labels. with_teacher: false once λ is 0. Without a teacher, or without a context for it, a
    response is plain GRPO. scores: of these rollouts, for rules that read them, in any order.

    Raises:
        InputError: tables of different rollouts, a text that its tokens do not spell, segments
            that do not tile it, or a rule that reads scores which are not there.
    """
    if with_teacher:
        require_scores(config, None if scores is None else scores.column_names)
    _same_rollouts(rollouts, verdicts, "verdicts")
    if annotations is not None:
        _same_rollouts(rollouts, annotations, "annotations")
    scored = scored_rollouts(rollouts, verdicts, config)
    masked = [POLICY_MASK] if POLICY_MASK in rollouts.column_names else []
    rollouts = rows_of(rollouts.select([*_READ, *masked]), scored.rows)
    verdicts = rows_of(verdicts.select(["correct"]), scored.rows)
    labels = reflections = pa.nulls(len(rollouts), pa.string())
    if annotations is not None:
        if TeacherContext.REFLECTION in (config.teacher_context, config.contrast_context):
            reflections = _reflections(annotations, scored.rows)
        annotations = rows_of(annotations.select(_ANNOTATED), scored.rows)
        labels = one_chunk(annotations["diagnostic_type"])
    own_problems = _problems_of(rollouts, problems)
    correct = to_numpy(pc.is_in(verdicts["correct"], value_set=pa.array([True])))
    known = Known(rollouts, own_problems, problems, correct, labels, reflections)
    contexts = teacher_contexts(known, config)
    offsets = _token_offsets(rollouts)
    taught = contexts.exists & with_teacher
    mask = flat_mask(rollouts)
    scored_tokens = None if scores is None else policy_scores(scores, rollouts, offsets, mask)
    routings = [
        route_written(
            aligned(
                rollouts[rows],
                annotations[rows] if annotations is not None else None,
                correct[rows],
                table,
                config.alpha,
                None if scored_tokens is None else scored_tokens.rows(rows),
            ),
            None if mask is None else mask[offsets[rows.start] : offsets[rows.stop]],
            taught[rows],
            config,
        )
        for rows in _blocks(offsets)
    ]
    columns = {name: rollouts[name] for name in (*_COPIED, *masked)} | {
        name: own_problems[name] for name in with_history(["problem"], own_problems)
    }
    columns |= {
        "reward": pa.array(scored.rewards.astype(np.float32)),
        "advantage": pa.array(scored.advantages),
        "correct": verdicts["correct"],
        "truncated": pa.array(truncated(rollouts)),
        **_labels(routings, offsets, contexts),
    }
    schema = ROUTED.schema_of(columns)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


@dataclass(frozen=True)
class Scored:
    """The rollouts to train on, their rewards and advantages.

    rows: (scored,) int64, their row numbers, ascending; rewards: (scored,) float64, the verifier's,
    shaped under `routing.overlong` soft; advantages: (scored,) float32.
    """

    rows: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray


def scored_rollouts(rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig) -> Scored:
    """The rollouts to train on; the two tables hold the same rollouts row by row.

    Rollouts without a reward, without the sampler's token ids (off-policy) or without tokens of the
    policy leave
    their group before its advantages are computed, as do those that stage select drops; under
    overlong `mask` truncated ones leave after.
    """
    lengths = policy_lengths(rollouts)
    scored = to_numpy(pc.is_valid(verdicts["reward"])) & to_numpy(rollouts["on_policy"])
    scored &= ~dropped(verdicts)
    rows = np.flatnonzero(scored & (lengths > 0))
    rewards = to_numpy(verdicts["reward"])[rows].astype(np.float64)
    if config.overlong == "soft":
        limits = to_numpy(rollouts["max_new_tokens"])[rows]
        rewards += overlong_penalty(lengths[rows], limits, config.overlong_buffer)
    groups = to_numpy(_groups(rollouts).indices)[rows]
    advantages = group_advantages(rewards, groups, config.advantage_eps, config.advantage)
    if config.overlong != "mask":
        return Scored(rows, rewards, advantages)
    kept = ~truncated(rollouts)[rows]
    return Scored(rows[kept], rewards[kept], advantages[kept])


def dropped(verdicts: pa.Table) -> np.ndarray:
    """(rows,) bool: whether stage select leaves a response out of training."""
    if "selection" not in verdicts.column_names:
        return np.zeros(len(verdicts), dtype=bool)
    return to_numpy(pc.is_in(verdicts["selection"], value_set=pa.array([str(Selection.DROP)])))


def truncated(rollouts: pa.Table) -> np.ndarray:
    """(rows,) bool: whether a response hit the token limit."""
    at_limit = pa.array([str(FinishReason.LENGTH)])
    return to_numpy(pc.is_in(rollouts["finish_reason"], value_set=at_limit))


def groups_without_signal(
    rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig
) -> list[str]:
    """Ids of groups whose advantages are all 0, in the rollouts' order; online.py replaces them."""
    scored = scored_rollouts(rollouts, verdicts, config)
    groups = _groups(rollouts)
    silent = np.ones(len(groups.dictionary), dtype=bool)
    silent[to_numpy(groups.indices)[scored.rows[scored.advantages != 0]]] = False
    return groups.dictionary.filter(pa.array(silent)).to_pylist()


def overlong_penalty(length: Any, limit: Any, buffer: int) -> Any:
    """Soft overlong penalty (DAPO, arXiv 2503.14476, equation 13): 0 … −1, added to the reward.

    It falls linearly over the last `buffer` tokens before `limit`; a buffer above the limit counts
    as the limit. All in tokens, as numbers or arrays.
    """
    buffers = np.minimum(buffer, limit)
    return -np.clip((length - (limit - buffers)) / buffers, 0.0, 1.0)


def group_advantages(
    rewards: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    eps: float,
    normalisation: Literal["std", "mean"] = "std",
) -> np.ndarray:
    """A = (r − mean) / (std + ε) within each group (METHOD.md, "Objective").

    `mean` omits the division (Dr. GRPO, arXiv 2503.20783). std is the sample standard deviation
    (n − 1), as in TRL; a group of one, or of equal rewards, gets exactly 0.
    rewards: (rollouts,) float; groups: (rollouts,) group ids. Returns (rollouts,) float32.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rewards = rewards.astype(np.float64)
    count = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, rewards) / count
    low, high = np.full_like(mean, np.inf), np.full_like(mean, -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    # In floating point the mean of equal numbers may differ from that number.
    centred = np.where((low == high)[index], 0.0, rewards - mean[index])
    if normalisation == "mean":
        return centred.astype(np.float32)
    std = np.sqrt(np.bincount(index, centred**2) / np.maximum(count - 1, 1))
    return (centred / (std[index] + eps)).astype(np.float32)


def _groups(rollouts: pa.Table) -> Any:
    """Group ids as an Arrow dictionary in order of appearance, with each row's index into it."""
    return one_chunk(rollouts["group_id"].dictionary_encode())


def _same_rollouts(rollouts: pa.Table, other: pa.Table, name: str) -> None:
    if not rollouts["rollout_id"].equals(other["rollout_id"]):
        own, theirs = other["rollout_id"].to_pylist(), rollouts["rollout_id"].to_pylist()
        pairs = zip_longest(own, theirs)
        row = next(row for row, (one, two) in enumerate(pairs) if one != two)
        raise RowFault(
            f"{name}, row {row}: rollout_id is {own[row] if row < len(own) else 'missing'}, the "
            f"rollouts have {theirs[row] if row < len(theirs) else 'no such row'}; rollout_id has "
            "to match row by row: run that stage again",
            name,
        )


def _problems_of(rollouts: pa.Table, problems: pa.Table) -> pa.Table:
    """The problem of each rollout.

    Raises:
        InputError: the table lacks a problem.
    """
    ids = one_chunk(problems["problem_id"])
    places: Any = one_chunk(pc.index_in(rollouts["problem_id"], value_set=ids))
    if places.null_count:
        row = pc.index(places.is_null(), True).as_py()
        raise InputError(
            f"rollout {rollouts['rollout_id'][row]}: problem {rollouts['problem_id'][row]} is not "
            "in the problems table; convert with the problems that were sampled from"
        )
    return problems.select(with_history(["problem", "answer", "solution"], problems)).take(places)


def _token_offsets(rollouts: pa.Table) -> np.ndarray:
    lengths = to_numpy(pc.list_value_length(rollouts["token_ids"]))
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _blocks(offsets: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive rows with at most _BLOCK_TOKENS tokens, or of one longer row."""
    first, rows = 0, len(offsets) - 1
    while first < rows:
        end = int(np.searchsorted(offsets, offsets[first] + _BLOCK_TOKENS, side="right")) - 1
        end = max(end, first + 1)
        yield slice(first, end)
        first = end


def _labels(
    routings: list[Routing], offsets: np.ndarray, contexts: TeacherContexts
) -> dict[str, pa.Array]:
    """The routed table's columns of routes, spans and teacher's contexts."""
    route = _joined((one.route for one in routings), np.uint8)
    span_id = _joined((one.span_id for one in routings), np.int16)
    coverage = _joined((one.coverage for one in routings), np.float32)
    dropped = _joined((one.dropped_tokens for one in routings), np.int32)
    routed = np.bitwise_or.reduceat(route, offsets[:-1]) != int(Route.GRPO)
    contrasts = contexts.contrasts
    optional = {} if contrasts is None else {"contrast_contexts": _where(routed, contrasts)}
    return optional | {
        "route": lists_of(route, offsets),
        "span_id": lists_of(span_id, offsets),
        "diagnostic_type": _where(coverage > 0, contexts.labels),
        "teacher_context": _where(routed, contexts.texts),
        "coverage": pa.array(coverage),
        "dropped_tokens": pa.array(dropped),
    }


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="same_kind")


def _where(mask: np.ndarray, texts: Any) -> pa.Array:
    return pc.if_else(pa.array(mask), texts, pa.scalar(None, texts.type))


def _reflections(annotations: pa.Table, rows: np.ndarray) -> Any:
    """Those of some rows; null in tables that are older than the column."""
    if _REFLECTION not in annotations.column_names:
        return pa.nulls(len(rows), pa.string())
    return one_chunk(rows_of(annotations.select([_REFLECTION]), rows)[_REFLECTION])


def lists_of(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """Flat values as an Arrow list column, without copying them."""
    flat: Any = pa.array(values)
    kind: Any = list_of(flat.type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)


def rows_of(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows, ascending. All rows are returned without a copy; few runs are copied run by run,
    which is several times faster than row by row."""
    if len(rows) == len(table):
        return table
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    if len(breaks) * 2 >= len(rows):
        return table.take(pa.array(rows, pa.int64()))
    runs = zip(rows[np.append(0, breaks)], rows[np.append(breaks, len(rows)) - 1], strict=True)
    return pa.concat_tables(table.slice(a, b - a + 1) for a, b in runs).combine_chunks()
