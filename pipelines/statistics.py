"""The bootstrap behind every interval, pass@k, and the counts of a problem's answers.

Called by stage evaluate, by validation in training, by comparisons of annotators and by the study.
The unit of resampling is the problem (or the pair of a seed and a problem), never the sample.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..schemas.labels import FinishReason

_VALUES_PER_CHUNK = 4_000_000  # bounds the memory of the drawn values


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; NaN without values."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | list[float] | None]:
        """Both null without values."""
        if np.isnan(self.value):
            return {"value": None, "ci95": None}
        return {"value": round(self.value, 6), "ci95": [round(self.low, 6), round(self.high, 6)]}


_NO_ESTIMATE = Estimate(np.nan, np.nan, np.nan)


def resampled(
    statistic: Callable[..., np.ndarray],
    sizes: Sequence[int],
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """A statistic of so many bootstrap resamples: (resamples, …).

    sizes: how many units of each kind there are. statistic: maps indices of drawn units, an array
    (count, size) for each size, to an array (count, …).
    """
    chunk = max(1, _VALUES_PER_CHUNK // prod(sizes))
    values = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = [[rng.integers(0, size, size) for size in sizes] for _ in range(count)]
        values.append(statistic(*map(np.stack, zip(*drawn, strict=True))))
    return np.concatenate(values)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of resampled values; without NaN values; NaN if all are."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Unweighted mean over strata of the mean within each, with a percentile interval.

    values: (problems,) float; strata: (problems,) labels such as the benchmark that a problem
    comes from. Problems are resampled within their stratum.
    """
    if not len(values):
        return _NO_ESTIMATE
    rng = np.random.default_rng(seed)
    groups = [values[strata == label] for label in np.unique(strata)]
    value, draws = 0.0, np.zeros(resamples)
    for group in groups:
        value += float(group.mean()) / len(groups)
        means = resampled(
            lambda index, g=group: g[index].mean(axis=1), [len(group)], resamples, rng
        )
        draws += means / len(groups)
    return Estimate(value, *percentiles(draws))


def bootstrap_sums(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int = 0
) -> Estimate:
    """A statistic of sums over problems, such as their quotient, with a percentile interval.

    values: (problems, columns) float; statistic: maps (…, columns) of sums to (…); NaN where it is
    undefined.
    """
    if not len(values):
        return _NO_ESTIMATE
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = resampled(
            lambda index: statistic(values[index].sum(axis=1)),
            [len(values)],
            resamples,
            np.random.default_rng(seed),
        )
        return Estimate(float(statistic(values.sum(axis=0))), *percentiles(draws))


def bootstrap_crossed(values: np.ndarray, resamples: int, seed: int = 0) -> Estimate:
    """Mean and percentile interval of values (seeds, problems).

    Seeds are resampled, and problems too, the same ones for all seeds: the interval covers both
    that another seed trains another policy and that other problems may be asked.
    """
    if not values.size:
        return _NO_ESTIMATE

    def means(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        drawn = values[rows[:, :, None], columns[:, None, :]]
        return drawn.reshape(len(drawn), -1).mean(axis=1)

    draws = resampled(means, values.shape, resamples, np.random.default_rng(seed))
    return Estimate(float(values.mean()), *percentiles(draws))


def pass_at_k(samples: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, per problem, or of all samples where there are fewer.

    1 − C(n − c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1). samples, correct: (problems,)
    int.
    """
    left = samples[:, None] - np.arange(k)[None, :]  # samples before each of k draws
    wrong = np.clip(left - correct[:, None], 0, None)
    return 1.0 - np.where(left > 0, wrong / np.maximum(left, 1), 1.0).prod(axis=1)


@dataclass(frozen=True)
class Answers:
    """A problem's rollouts, and the verdicts of those that could be scored."""

    rollouts: list[dict[str, Any]]
    scored: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        """Columns that evaluations and validations share."""
        return {
            "k": len(self.scored),
            "correct": sum(verdict["correct"] for verdict in self.scored),
            "truncated": sum(r["finish_reason"] == FinishReason.LENGTH for r in self.rollouts),
        }

    @property
    def tokens(self) -> int | None:
        """Response tokens, all rollouts together; None where a sampler keeps no ids of a text."""
        if any(rollout["response"] and not rollout["token_ids"] for rollout in self.rollouts):
            return None
        return sum(len(rollout["token_ids"]) for rollout in self.rollouts)


def answers_by_problem(
    rollouts: Iterable[dict[str, Any]], verdicts: Iterable[dict[str, Any]]
) -> dict[str, Answers]:
    """Rows of rollouts and of their verdicts, in the same order, by problem id."""
    answers: dict[str, Answers] = defaultdict(lambda: Answers([], []))
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        own = answers[rollout["problem_id"]]
        own.rollouts.append(rollout)
        if verdict["correct"] is not None:
            own.scored.append(verdict)
    return answers
