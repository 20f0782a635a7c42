"""Figures of a study's tables: pass rates by arm, and a curve's summary; page.py and plots.py draw.

Differences between arms are paired: same seeds, same problems, same sampling seeds. Intervals are
`statistics.bootstrap_crossed` over seeds and problems.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from ..training.validation import SAMPLED


@dataclass(frozen=True)
class Curves:
    """Pass rates of one arm: rates (seeds, evaluations, problems), steps (evaluations,)."""

    rates: np.ndarray
    steps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(evaluations,) over seeds and problems."""
        return self.rates.mean(axis=(0, 2))

    @property
    def final(self) -> np.ndarray:
        """(seeds, problems) after the last step."""
        return self.rates[:, -1]

    @property
    def area(self) -> np.ndarray:
        """(seeds, problems): the curve's mean height, by the trapezoid rule over steps."""
        span = self.steps[-1] - self.steps[0]
        return np.trapezoid(self.rates, self.steps, axis=1) / span if span else self.final

    def first_step(self, threshold: float) -> int | None:
        """First evaluated step at which the mean reaches the threshold."""
        reached = np.flatnonzero(self.mean >= threshold)
        return int(self.steps[reached[0]]) if len(reached) else None


def of_arm(table: pl.DataFrame, ablation: str, method: str) -> pl.DataFrame:
    """Rows of one arm."""
    return table.filter(ablation=ablation, method=method)


def tuning_rate(results: pl.DataFrame, method: str, choice: str) -> float:
    """Sampled pass rate of a tuning run, mean over its evaluations."""
    own = results.filter(method=method, choice=choice, decoding=SAMPLED)
    return float(np.mean(own["pass_rate"].to_numpy()))


def pass_rate(answers: pl.DataFrame) -> float:
    """Share of all scored answers that are right; 0 without any."""
    return answers["correct"].sum() / max(answers["k"].sum(), 1)


def curves(answers: pl.DataFrame, split: str, decoding: str) -> Curves:
    """Pass rates in one arm's rows, without problems that had no scored answer at some step."""
    rows = answers.filter(split=split, decoding=decoding).sort("seed", "step", "problem_id")
    shape = [rows[name].n_unique() for name in ("seed", "step", "problem_id")]
    rates = (rows["correct"] / rows["k"]).to_numpy().reshape(shape)
    scored = np.isfinite(rates).all(axis=(0, 1))
    return Curves(rates[:, :, scored], rows["step"].unique().sort().to_numpy())
