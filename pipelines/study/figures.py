"""Figures and plots of a study's tables: pass rates by arm, curves and their summaries.

page.py takes the figures, study.py writes the plots (SVG; equal figures make equal bytes).
Differences between arms are paired: same seeds, same problems, same sampling seeds. Intervals are
`statistics.bootstrap_crossed` over seeds and problems.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ...data.atomic import write_atomic
from ...schemas.configs import StudyConfig
from ..training.validation import SAMPLED


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


def of_arm(table: pl.DataFrame, ablation: str, method: str) -> pl.DataFrame:
    """Rows of one arm."""
    return table.filter(ablation=ablation, method=method)


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """NaN, without a warning, where there are no values: no problem had a scored answer."""
    with np.errstate(invalid="ignore"):
        total = values.sum(axis=axis)
        return total / (values.size / total.size if total.size else 1)


def tuning_rate(results: pl.DataFrame, method: str, choice: str) -> float | None:
    """Sampled pass rate of a tuning run, mean over its evaluations; None without any."""
    own = results.filter(method=method, choice=choice, decoding=SAMPLED)["pass_rate"].drop_nulls()
    return float(np.mean(own.to_numpy())) if len(own) else None


def pass_rate(answers: pl.DataFrame) -> float | None:
    """Share of all scored answers that are right; None without any."""
    asked = sum(answers["k"])
    return sum(answers["correct"]) / asked if asked else None


def curves(answers: pl.DataFrame, split: str, decoding: str) -> Curves:
    """Pass rates in one arm's rows, without problems that had no scored answer at some step."""
    rows = answers.filter(split=split, decoding=decoding).sort("seed", "step", "problem_id")
    shape = [rows[name].n_unique() for name in ("seed", "step", "problem_id")]
    rates = (rows["correct"] / rows["k"]).to_numpy().reshape(shape)
    scored = np.isfinite(rates).all(axis=(0, 1))
    return Curves(rates[:, :, scored], rows["step"].unique().sort().to_numpy())


def plot_curves(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Sampled pass rate over steps on the main split: each arm's mean and range over seeds."""
    main = next(iter(config.splits))
    figure, axes = _axes(config)
    for index, method in enumerate(config.ablations[ablation]):
        drawn = curves(of_arm(answers, ablation, method), main, SAMPLED)
        by_seed = mean(drawn.rates, 2)  # (seeds, evaluations)
        style = "-" if index < 10 else "--"
        (line,) = axes.plot(drawn.steps, drawn.mean, style, label=method)
        axes.fill_between(
            drawn.steps, by_seed.min(0), by_seed.max(0), color=line.get_color(), alpha=0.1
        )
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"sampled pass rate, {main}")
    axes.legend(fontsize=7, loc="lower right")
    _write(figure, axes, path)


def plot_exposure(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Σλ² against the change of the pass rate on the other splits, a point per run."""
    figure, axes = _axes(config)
    for split in list(config.splits)[1:]:
        exposures, changes = [], []
        for method in config.ablations[ablation]:
            own = of_arm(answers, ablation, method)
            rates = mean(curves(own, split, SAMPLED).rates, 2)  # (seeds, evaluations)
            changes += (100 * (rates[:, -1] - rates[:, 0])).tolist()
            exposures += [own["kl_exposure"].max()] * len(rates)
        axes.plot(exposures, changes, "o", alpha=0.7, label=split)
    axes.set_xlabel("Σλ²")
    axes.set_ylabel("change of the sampled pass rate, points")
    axes.legend(fontsize=7)
    _write(figure, axes, path)


def _axes(config: StudyConfig) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = config.name
    figure = Figure(figsize=(7, 4))
    return figure, figure.subplots()


def _write(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_atomic(path, drawn.getvalue())
