"""Verdicts to rewards to group-normalised advantages."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..schemas.configs import RoutingConfig
from ..schemas.labels import FinishReason


@dataclass(frozen=True)
class Scored:
    """A rollout that can be trained on, and what it earns.

    row: its place in the tables; rollout: its row of the rollouts table; reward: the verifier's,
    shaped where `routing.overlong` says so.
    """

    row: int
    rollout: dict[str, Any]
    correct: bool
    reward: float
    advantage: float = 0.0

    @property
    def truncated(self) -> bool:
        return self.rollout["finish_reason"] == FinishReason.LENGTH


def scored_rollouts(rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig) -> list[Scored]:
    """What can be trained on; the two tables hold the same rollouts in order.

    Rollouts without a reward say nothing about the response: they leave their group before its
    advantages are formed, and so do off-policy ones (without the sampler's ids). Under overlong
    `mask` truncated ones leave it after.
    """
    scored = []
    for row, (rollout, verdict) in enumerate(
        zip(rollouts.to_pylist(), verdicts.to_pylist(), strict=True)
    ):
        if verdict["reward"] is None or not rollout["on_policy"] or not rollout["token_ids"]:
            continue
        reward = verdict["reward"]
        if config.overlong == "soft":
            length, limit = len(rollout["token_ids"]), rollout["max_new_tokens"]
            reward += overlong_penalty(length, limit, config.overlong_buffer)
        scored.append(Scored(row, rollout, verdict["correct"], reward))
    advantages = group_advantages(
        np.array([one.reward for one in scored], dtype=np.float64),
        [one.rollout["group_id"] for one in scored],
        config.advantage_eps,
        config.advantage,
    )
    return [
        replace(one, advantage=float(advantage))
        for one, advantage in zip(scored, advantages, strict=True)
        if config.overlong != "mask" or not one.truncated
    ]


def groups_without_signal(
    rollouts: pa.Table, verdicts: pa.Table, config: RoutingConfig
) -> list[str]:
    """Ids of groups in which no response is better than another, in the rollouts' order."""
    scored = scored_rollouts(rollouts, verdicts, config)
    signal = {one.rollout["group_id"] for one in scored if one.advantage}
    groups = dict.fromkeys(str(group) for group in rollouts["group_id"].to_pylist())
    return [group for group in groups if group not in signal]


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): 0 … −1, added to the reward.

    It falls linearly over the last `buffer` tokens before `limit`; a buffer above the limit counts
    as the limit. All in tokens.
    """
    buffer = min(buffer, limit)
    return -min(max((length - (limit - buffer)) / buffer, 0.0), 1.0)


def group_advantages(
    rewards: np.ndarray,
    groups: Sequence[Hashable],
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
