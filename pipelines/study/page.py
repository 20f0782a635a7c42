"""A study's page in Markdown: every figure on it comes from the two Parquet files beside it."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from ...schemas.configs import StudyConfig
from ..bootstrap import Estimate
from ..validation import GREEDY, SAMPLED
from .figures import bootstrap, curves, pass_rate

_REFERENCE = "grpo"  # differences are to this arm of the same table, or of the first one


def page(config: StudyConfig, answers: pl.DataFrame, results: pl.DataFrame, files: str) -> str:
    """The whole page; files: folder of the study's files, as the page links to it."""
    lines = [f"# Study: {config.name}", "", *_introduction(config, answers, files)]
    for ablation in config.ablations:
        lines += ["", f"## {ablation}", "", *_table(config, answers, results, ablation)]
        lines += ["", f"![{ablation}: pass rate over steps]({files}/{ablation}.svg)"]
    if config.tuning is not None:
        lines += ["", "## What tuning chose", "", *_choices(results)]
    return "\n".join(lines) + "\n"


def _introduction(config: StudyConfig, answers: pl.DataFrame, files: str) -> Iterator[str]:
    main = next(iter(config.splits))
    # The arms of later tables may start from other bases.
    base = answers.filter(
        (pl.col("step") == 0)
        & (pl.col("decoding") == SAMPLED)
        & (pl.col("ablation") == next(iter(config.ablations)))
    )
    starts = []
    for split in config.splits:
        rows = base.filter(pl.col("split") == split)
        starts.append(f"{split} {_percent(pass_rate(rows))}")
    steps, runs = answers["step"].max(), answers["run"].n_unique()
    yield (
        f"Written by `trace-opd study` from [{files}/answers.parquet]({files}/answers.parquet) (a row "
        f"per run, look and problem) and results.parquet (a row per run and look); the whole config "
        f"is [{files}/study.yaml]({files}/study.yaml). {runs} runs of {steps} steps, seeds "
        f"{', '.join(map(str, config.seeds))}."
    )
    yield ""
    yield (
        f"Sampled pass rate before training, in the first table: {', '.join(starts)}. In the "
        f"tables: pass rate on {main} after the last step with its 95 % interval (bootstrap over "
        f"seeds and problems), its difference to {_REFERENCE} (paired), greedy pass rate, area under "
        f"the curve (mean height), first look at {_percent(config.threshold)} or more, entropy "
        "(nats per sampled token), response tokens, Σλ², and the sampled pass rate on the other "
        "splits. A difference whose interval holds 0 is none."
    )


def _table(
    config: StudyConfig, answers: pl.DataFrame, results: pl.DataFrame, ablation: str
) -> Iterator[str]:
    main, *others = config.splits
    names = ["arm", "pass rate", f"− {_REFERENCE}", "greedy", "area", "steps", "entropy", "tokens"]
    names += ["Σλ²", *others]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    reference = _reference(config, answers, ablation)
    for method in config.ablations[ablation]:
        own = _of(answers, ablation, method)
        sampled = curves(own, main, SAMPLED)
        final = bootstrap(sampled.final, config.bootstrap)
        difference = "–"
        if reference is not None and method != _REFERENCE:
            seeds = own["seed"].unique().to_list()
            their = curves(reference.filter(pl.col("seed").is_in(seeds)), main, SAMPLED)
            if their.final.shape == sampled.final.shape:
                difference = _points(bootstrap(sampled.final - their.final, config.bootstrap))
        greedy = "–"
        if config.train.validation is not None and config.train.validation.greedy:
            greedy = _percent(curves(own, main, GREEDY).final.mean())
        last = _of(results, ablation, method).filter(
            (pl.col("step") == pl.col("step").max()) & (pl.col("decoding") == SAMPLED)
        )
        here = last.filter(pl.col("split") == main)
        cells = [
            method,
            _interval(final),
            difference,
            greedy,
            _percent(sampled.area.mean()),
            "–" if (first := sampled.first_step(config.threshold)) is None else str(first),
            f"{here['entropy'].mean():.3f}",
            f"{here['length'].mean():.1f}",
            f"{here['kl_exposure'].mean():.2f}",
            *(_percent(last.filter(pl.col("split") == o)["pass_rate"].mean()) for o in others),
        ]
        yield "| " + " | ".join(cells) + " |"


def _reference(config: StudyConfig, answers: pl.DataFrame, ablation: str) -> pl.DataFrame | None:
    for table in (ablation, next(iter(config.ablations))):
        if _REFERENCE in config.ablations[table]:
            return _of(answers, table, _REFERENCE)
    return None


def _choices(results: pl.DataFrame) -> Iterator[str]:
    yield "| ablation | arm | choice |"
    yield "|---|---|---|"
    for row in results.unique(["ablation", "method"], maintain_order=True).iter_rows(named=True):
        yield f"| {row['ablation']} | {row['method']} | `{row['choice']}` |"


def _of(table: pl.DataFrame, ablation: str, method: str) -> pl.DataFrame:
    return table.filter((pl.col("ablation") == ablation) & (pl.col("method") == method))


def _percent(value: object) -> str:
    return f"{value:.1%}".replace("%", " %") if isinstance(value, float) else "–"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _points(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def plot(config: StudyConfig, answers: pl.DataFrame, ablation: str, path: Path) -> None:
    """Sampled pass rate over steps on the main split, a line per arm, mean over seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = config.name  # the same figures, the same bytes
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for index, method in enumerate(config.ablations[ablation]):
        drawn = curves(_of(answers, ablation, method), next(iter(config.splits)), SAMPLED)
        by_seed = drawn.rates.mean(axis=2)  # (seeds, looks)
        style = "-" if index < 10 else "--"
        (line,) = axes.plot(drawn.steps, drawn.mean, style, label=method)
        axes.fill_between(
            drawn.steps, by_seed.min(0), by_seed.max(0), color=line.get_color(), alpha=0.1
        )
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"sampled pass rate, {next(iter(config.splits))}")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
