"""Figures and plots of a study's tables: pass rates by arm, curves and their summaries.

page.py takes the figures, study.py writes the plots (SVG; equal figures make equal bytes).
Differences between arms are paired: same seeds, same problems, same sampling seeds. Intervals are
`statistics.bootstrap_crossed` over seeds and problems.
"""

from pathlib import Path

import numpy as np
import polars as pl

from ...schemas.configs import StudyConfig
from ...schemas.errors import InputError, shortened
from ...schemas.extras import require
from ...schemas.settings import load_config
from ..plots.lines import Panel, draw_panels
from ..plots.rates import curves, mean
from ..plots.style import MARKERS, MUTED, caption, new_figure, style_of, styled, write
from ..plots.training import intervals_caption, rate_line
from ..training.validation import SAMPLED
from .claims_figures import plot_claims

# In a study's folder.
CONFIG, _ANSWERS, COMPARISONS = "study.yaml", "answers.parquet", "comparisons.parquet"


def of_arm(table: pl.DataFrame, ablation: str, method: str) -> pl.DataFrame:
    """Rows of one arm."""
    return table.filter(ablation=ablation, method=method)


def tuning_rate(results: pl.DataFrame, method: str, choice: str) -> float | None:
    """Sampled pass rate of a tuning run, mean over its evaluations; None without any."""
    own = results.filter(method=method, choice=choice, decoding=SAMPLED)["pass_rate"].drop_nulls()
    return float(np.mean(own.to_numpy())) if len(own) else None


def pass_rate(answers: pl.DataFrame) -> float | None:
    """Share of all scored answers that are right; None without any."""
    asked = sum(answers["k"])
    return sum(answers["correct"]) / asked if asked else None


def plot_curves(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Sampled pass rate over steps on the main split: each arm's mean with its 95 % interval."""
    main = next(iter(config.splits))
    arms = {
        method: curves(of_arm(answers, ablation, method), main, SAMPLED)
        for method in config.ablations[ablation]
    }
    lines = [rate_line(method, own, config.bootstrap) for method, own in arms.items()]
    title = f"{config.name}: {ablation}"
    panels = [Panel(title, f"sampled pass rate on {main}", lines, share=True)]
    seeds = max(len(own.rates) for own in arms.values())
    with styled():
        figure = draw_panels(panels)
        over = f"{seeds} seeds and {next(iter(arms.values())).rates.shape[2]} problems"
        caption(figure, intervals_caption(panels, over))
        write(figure, path)


def plot_exposure(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Σλ² against the change of the pass rate on the other splits, a point per run.

    The splits of an exposure stand side by side.
    """
    with styled():
        figure, (axes,) = new_figure(1, 1, 3.6)
        others = list(config.splits)[1:]
        widest = answers.filter(ablation=ablation)["kl_exposure"].to_numpy().max()
        apart = 0.012 * float(widest)  # so that splits do not hide each other
        for number, split in enumerate(others):
            exposures, changes = [], []
            for method in config.ablations[ablation]:
                own = of_arm(answers, ablation, method)
                rates = mean(curves(own, split, SAMPLED).rates, 2)  # (seeds, evaluations)
                changes += (100 * (rates[:, -1] - rates[:, 0])).tolist()
                exposures += [own["kl_exposure"].max()] * len(rates)
            places = [exposure + apart * (number - len(others) / 2 + 0.5) for exposure in exposures]
            colour = style_of(number)["color"]
            axes.plot(places, changes, MARKERS[number], alpha=0.75, label=split, color=colour)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_title(f"{config.name}: {ablation}")
        axes.set_xlabel("Σλ² of the run")
        axes.set_ylabel("change of the sampled pass rate, points")
        figure.legend(fontsize=8.5, loc="outside right upper")
        write(figure, path)


def draw(
    config: StudyConfig, answers: pl.DataFrame, comparisons: pl.DataFrame | None, folder: Path
) -> list[Path]:
    """Write the plots of a study, and return their paths. comparisons: of its claims."""
    paths = [folder / f"{ablation}.svg" for ablation in config.ablations]
    for ablation, path in zip(config.ablations, paths, strict=True):
        plot_curves(config, answers, ablation, path)
    if config.exposure is not None:
        paths.append(folder / "exposure.svg")
        plot_exposure(config, answers, config.exposure, paths[-1])
    if comparisons is not None:
        paths += plot_claims(config, comparisons, folder)
    return paths


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study's tables."""
    return (folder / CONFIG).is_file() and (folder / _ANSWERS).is_file()


def redraw(folder: Path) -> list[Path]:
    """Draw the plots of a study's folder again from its tables; nothing is trained.

    Raises:
        InputError: the tables are not those of a study; matplotlib is not installed.
    """
    require("matplotlib")
    config = load_config(StudyConfig, str(folder / CONFIG))
    try:
        answers = pl.read_parquet(folder / _ANSWERS)
        comparisons = pl.read_parquet(folder / COMPARISONS) if config.claims else None
        return draw(config, answers, comparisons, folder)
    except (pl.exceptions.PolarsError, ValueError, LookupError, FileNotFoundError) as error:
        tables = f"{_ANSWERS} or {COMPARISONS}" if config.claims else _ANSWERS
        raise InputError(
            f"{folder}: {tables} is not the table of {folder / CONFIG} ({shortened(error)}); "
            "run the study again"
        ) from error
