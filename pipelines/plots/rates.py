"""Pass rates of validations over seeds, steps and problems, with 95 % intervals.

The study and `trace-opd plot` read an arm's or a group's rows with it.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from ..statistics import Estimate, bootstrap_crossed


@dataclass(frozen=True)
class Curves:
    """Pass rates of one arm: rates (seeds, evaluations, problems), steps (evaluations,)."""

    rates: np.ndarray
    steps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(evaluations,) over seeds and problems."""
        return mean(self.rates, (0, 2))

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

    def intervals(self, resamples: int) -> tuple[np.ndarray, np.ndarray]:
        """95 % intervals of the means, low and high: (evaluations,) each; see
        `statistics.bootstrap_crossed`."""
        found = [bootstrap_crossed(self.rates[:, n], resamples) for n in range(len(self.steps))]
        return np.array([one.low for one in found]), np.array([one.high for one in found])

    def change(self, resamples: int) -> Estimate:
        """From the first evaluation to the last one, of the same seeds and problems."""
        return bootstrap_crossed(self.rates[:, -1] - self.rates[:, 0], resamples)


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """NaN, without a warning, where there are no values: no problem had a scored answer."""
    with np.errstate(invalid="ignore"):
        total = values.sum(axis=axis)
        return total / (values.size / total.size if total.size else 1)


def curves(answers: pl.DataFrame, split: str, decoding: str) -> Curves:
    """Pass rates in one arm's rows, without problems that had no scored answer at some step."""
    rows = answers.filter(split=split, decoding=decoding).sort("seed", "step", "problem_id")
    shape = [rows[name].n_unique() for name in ("seed", "step", "problem_id")]
    rates = (rows["correct"] / rows["k"]).to_numpy().reshape(shape)
    scored = np.isfinite(rates).all(axis=(0, 1))
    return Curves(rates[:, :, scored], rows["step"].unique().sort().to_numpy())
