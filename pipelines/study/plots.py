"""A study's plots as SVG: the same figures, the same bytes."""

import io
from pathlib import Path
from typing import Any

import polars as pl

from ...data.atomic import write_atomic
from ...schemas.configs import StudyConfig
from ..training.validation import SAMPLED
from .figures import curves, of_arm


def plot_curves(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Sampled pass rate over steps on the main split, a line per arm: mean over seeds, their range."""
    main = next(iter(config.splits))
    figure, axes = _axes(config)
    for index, method in enumerate(config.ablations[ablation]):
        drawn = curves(of_arm(answers, ablation, method), main, SAMPLED)
        by_seed = drawn.rates.mean(axis=2)  # (seeds, looks)
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
            rates = curves(own, split, SAMPLED).rates.mean(axis=2)  # (seeds, looks)
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
