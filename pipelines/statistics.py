"""Percentile bootstrap over problems: the unit of resampling is the problem, not the sample."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | list[float]]:
        return {"value": round(self.value, 6), "ci95": [round(self.low, 6), round(self.high, 6)]}


def bootstrap_mean(values: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Unweighted mean over strata of the mean within each, with a percentile interval.

    values: (problems,) float; strata: (problems,) labels such as the benchmark that a problem
    comes from. Problems are resampled within their stratum.
    """
    rng = np.random.default_rng(seed)
    labels = np.unique(strata)
    value, draws = 0.0, np.zeros(resamples)
    for label in labels:
        group = values[strata == label]
        value += float(group.mean()) / len(labels)
        # Chunks bound the memory: a resample is one row of indices.
        step = max(1, 4_000_000 // max(len(group), 1))
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            index = rng.integers(0, len(group), size=(count, len(group)))
            draws[start : start + count] += group[index].mean(axis=1) / len(labels)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, per problem, estimated from `samples` of them.

    1 − C(n − c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1). correct: (problems,) int.
    """
    draws = samples - correct[:, None] - np.arange(k)[None, :]
    shares = np.clip(draws, 0, None) / (samples - np.arange(k))[None, :]
    return 1.0 - shares.prod(axis=1)
