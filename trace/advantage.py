"""Verdicts to rewards to group-normalised advantages."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.labels import FinishReason
from .ragged import one_chunk, to_numpy


@dataclass(frozen=True)
class Scored:
    """The rollouts that can be trained on, and what they earn.

    rows: (scored,) int64, their places in the tables, ascending; rewards: (scored,) float64, the
    verifier's, shaped where `routing.overlong` says so; advantages: (scored,) float32.
    """

    rows: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray


def scored_rollouts(rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig) -> Scored:
    """What can be trained on; the two tables hold the same rollouts in order.

    Rollouts without a reward say nothing about the response: they leave their group before its
    advantages are formed, and so do off-policy ones (without the sampler's ids). Under overlong
    `mask` truncated ones leave it after.
    """
    lengths = to_numpy(pc.list_value_length(rollouts["token_ids"]))
    scored = to_numpy(pc.is_valid(verdicts["reward"])) & to_numpy(rollouts["on_policy"])
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


def truncated(rollouts: pa.Table) -> np.ndarray:
    """(rows,) bool: whether a response hit the token limit."""
    at_limit = pa.array([str(FinishReason.LENGTH)])
    return to_numpy(pc.is_in(rollouts["finish_reason"], value_set=at_limit))


def groups_without_signal(
    rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig
) -> list[str]:
    """Ids of groups in which no response is better than another, in the rollouts' order."""
    scored = scored_rollouts(rollouts, verdicts, config)
    groups = _groups(rollouts)
    silent = np.ones(len(groups.dictionary), dtype=bool)
    silent[to_numpy(groups.indices)[scored.rows[scored.advantages != 0]]] = False
    return groups.dictionary.filter(pa.array(silent)).to_pylist()


def overlong_penalty(length: Any, limit: Any, buffer: int) -> Any:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): 0 … −1, added to the reward.

    It falls linearly over the last `buffer` tokens before `limit`; a buffer above the limit counts
    as the limit. All in tokens, numbers or arrays of them.
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

    `mean` leaves the division out (Dr. GRPO, arXiv 2503.20783). The standard deviation is the
    sample one (n − 1), as in TRL; a group of one, or of equal rewards, gets exactly 0.
    rewards: (rollouts,) float; groups: (rollouts,) group ids. Returns (rollouts,) float32.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rewards = rewards.astype(np.float64)
    count = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, rewards) / count
    low, high = np.full_like(mean, np.inf), np.full_like(mean, -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    # The mean of equal numbers need not be that number in floating point.
    centred = np.where((low == high)[index], 0.0, rewards - mean[index])
    if normalisation == "mean":
        return centred.astype(np.float32)
    std = np.sqrt(np.bincount(index, centred**2) / np.maximum(count - 1, 1))
    return (centred / (std[index] + eps)).astype(np.float32)


def _groups(rollouts: pa.Table) -> Any:
    """The group ids as a dictionary in order of appearance, and each row's index into it."""
    return one_chunk(rollouts["group_id"].dictionary_encode())
