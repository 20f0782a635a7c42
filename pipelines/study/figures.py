"""Figures of a study's tables: pass rates by arm, and a curve's summary; page.py and plots.py draw.

Differences between arms are paired: same seeds, same problems, same sampling seeds. Intervals are
`statistics.bootstrap_crossed` over seeds and problems.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

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
