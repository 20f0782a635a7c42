"""What a study's tables say: means with intervals over seeds and problems, and a curve's summary.

The unit of resampling is the pair of a seed and a problem: seeds are drawn with replacement, and
problems too, the same ones for all seeds, so an interval covers both that another seed would have
trained another policy and that other problems would have been asked. Differences to a method are
paired: same seeds, same problems, same samples' seeds.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from ..statistics import Estimate
from ..training.validation import SAMPLED

RATE = pl.col("correct") / pl.col("k")


@dataclass(frozen=True)
class Curves:
    """Pass rates of one method: rates (seeds, looks, problems), steps (looks,)."""

    rates: np.ndarray
    steps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(looks,) over seeds and problems."""
        return self.rates.mean(axis=(0, 2))

    @property
    def final(self) -> np.ndarray:
        """(seeds, problems) at the last look."""
        return self.rates[:, -1]

    @property
    def area(self) -> np.ndarray:
        """(seeds, problems): the curve's mean height, by the trapezoid rule over steps."""
        span = self.steps[-1] - self.steps[0]
        if not span:
            return self.final
        return np.trapezoid(self.rates, self.steps, axis=1) / span

    def first_step(self, threshold: float) -> int | None:
        """First look at which the mean over seeds reaches the threshold."""
        reached = np.flatnonzero(self.mean >= threshold)
        return int(self.steps[reached[0]]) if len(reached) else None


def of_arm(table: pl.DataFrame, ablation: str, method: str) -> pl.DataFrame:
    """Rows of one arm."""
    return table.filter((pl.col("ablation") == ablation) & (pl.col("method") == method))


def tuning_rate(table: pl.DataFrame, method: str, choice: str) -> float:
    """Sampled pass rate of a tuning run, mean over its looks; table: the tuning runs' results."""
    own = table.filter(
        (pl.col("method") == method)
        & (pl.col("choice") == choice)
        & (pl.col("decoding") == SAMPLED)
    )
    return float(np.mean(own["pass_rate"].to_numpy()))


def pass_rate(answers: pl.DataFrame) -> float:
    """Share of all scored answers that are right; 0 if there is none."""
    return sum(answers["correct"].to_list()) / max(sum(answers["k"].to_list()), 1)


def curves(answers: pl.DataFrame, split: str, decoding: str) -> Curves:
    """Of one method's rows. Problems that nobody could score at some look are left out."""
    rows = answers.filter((pl.col("split") == split) & (pl.col("decoding") == decoding))
    wide = rows.select("seed", "step", "problem_id", rate=RATE).sort("seed", "step", "problem_id")
    seeds, steps, problems = (wide[name].n_unique() for name in ("seed", "step", "problem_id"))
    rates = wide["rate"].to_numpy().reshape(seeds, steps, problems)
    scored = np.isfinite(rates).all(axis=(0, 1))
    return Curves(rates[:, :, scored], wide["step"].unique().sort().to_numpy())


def bootstrap(values: np.ndarray, resamples: int, seed: int = 0) -> Estimate:
    """Mean and percentile interval of values (seeds, problems)."""
    rng = np.random.default_rng(seed)
    seeds, problems = values.shape
    draws = np.empty(resamples)
    for at in range(resamples):
        rows = rng.integers(0, seeds, seeds)
        columns = rng.integers(0, problems, problems)
        draws[at] = values[np.ix_(rows, columns)].mean()
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))
