"""Group-normalised advantages."""

from collections.abc import Hashable, Sequence

import numpy as np


def group_advantages(rewards: np.ndarray, groups: Sequence[Hashable], eps: float) -> np.ndarray:
    """A = (r − mean) / (std + ε) within each group (METHOD.md, "Objective").

    rewards: (rollouts,) float; groups: (rollouts,) group ids. The standard deviation is the
    sample one (n − 1), as in TRL; a group of one, or of equal rewards, gets 0.
    Returns (rollouts,) float32.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rewards = rewards.astype(np.float64)
    count = np.bincount(index).astype(np.float64)
    mean = np.bincount(index, rewards) / count
    squares = np.bincount(index, (rewards - mean[index]) ** 2)
    std = np.sqrt(squares / np.maximum(count - 1, 1))
    return ((rewards - mean[index]) / (std[index] + eps)).astype(np.float32)
