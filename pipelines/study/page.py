"""A study's page in Markdown: every figure on it comes from the Parquet files beside it."""

from collections.abc import Iterator

import polars as pl

from ...schemas.configs import ReportedConfig, StudyConfig
from ..statistics import Estimate
from ..training.validation import GREEDY, SAMPLED
from .figures import bootstrap, curves, pass_rate, tuning_rate
from .figures import of_arm as _of

_REFERENCE = "grpo"  # differences are to this arm of the same table, or of the first one


def page(
    config: StudyConfig,
    answers: pl.DataFrame,
    results: pl.DataFrame,
    mechanism: pl.DataFrame | None,
    tuning: pl.DataFrame | None,
    files: str,
) -> str:
    """The whole page; tuning: results of the runs that tuned; files: folder of the study's files, as
    the page links to it."""
    lines = [f"# Study: {config.name}", "", *_introduction(config, answers, files)]
    if config.about:
        lines += ["", config.about.strip()]
    for ablation in config.ablations:
        lines += ["", f"## {ablation}", "", *_table(config, answers, results, ablation)]
        lines += ["", f"![{ablation}: pass rate over steps]({files}/{ablation}.svg)"]
    if config.exposure is not None:
        lines += ["", "## exposure", "", *_exposure(config, answers, config.exposure)]
        lines += ["", f"![Σλ² against how far other splits moved]({files}/exposure.svg)"]
    if mechanism is not None:
        lines += ["", "## mechanism", "", *_mechanism(config, mechanism, files)]
    if tuning is not None:
        lines += ["", "## What tuning chose", "", *_choices(config, results, tuning, files)]
    if config.reported is not None:
        lines += ["", "## What the paper reports", "", *_reported(config.reported)]
    return "\n".join(lines) + "\n"


def _introduction(config: StudyConfig, answers: pl.DataFrame, files: str) -> Iterator[str]:
    main = next(iter(config.splits))
    # The arms of later tables may start from other bases.
    base = answers.filter(
        (pl.col("step") == 0)
        & (pl.col("decoding") == SAMPLED)
        & (pl.col("ablation") == next(iter(config.ablations)))
    )
    starts = [
        f"{split} {_percent(pass_rate(base.filter(pl.col('split') == split)))}"
        for split in config.splits
    ]
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
        f"tables: pass rate on {main} before, and after the last step with its 95 % interval (bootstrap over "
        f"seeds and problems), its difference to {_REFERENCE} or to the arm that is named (paired, "
        f"percentage points), greedy pass rate before and after, area under the "
        f"curve (mean height), first look at {_percent(config.threshold)} or more, entropy "
        "(nats per sampled token), response tokens, Σλ², coverage (share of the tokens that the KL was on "
        "while λ > 0), and the sampled pass rate on the other splits"
        f"{' and the mean of all' if config.mean else ''}. A difference whose interval holds 0 is not "
        "resolved; of few seeds even an interval without it says little."
    )


def _table(
    config: StudyConfig, answers: pl.DataFrame, results: pl.DataFrame, ablation: str
) -> Iterator[str]:
    main, *others = config.splits
    names = ["arm", "before", "pass rate", f"− {_REFERENCE}", "greedy", "area", "steps", "entropy"]
    names += ["tokens", "Σλ²", "coverage", *others, *(["mean"] if config.mean else [])]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for method, arm in config.ablations[ablation].items():
        own = _of(answers, ablation, method)
        sampled = curves(own, main, SAMPLED)
        final = bootstrap(sampled.final, config.bootstrap)
        difference = _difference(config, answers, ablation, method, arm.against)
        greedy = "–"
        if config.train.validation is not None and config.train.validation.greedy:
            answered = curves(own, main, GREEDY).rates.mean(axis=(0, 2))  # (looks,)
            greedy = f"{_percent(answered[0])} to {_percent(answered[-1])}"
        last = _of(results, ablation, method).filter(
            (pl.col("step") == pl.col("step").max()) & (pl.col("decoding") == SAMPLED)
        )
        here = last.filter(pl.col("split") == main)
        elsewhere = [last.filter(pl.col("split") == o)["pass_rate"].mean() for o in others]
        mean = [_percent(float(last["pass_rate"].to_numpy().mean()))] if config.mean else []
        cells = [
            method,
            _percent(sampled.mean[0]),
            _interval(final),
            difference,
            greedy,
            _percent(sampled.area.mean()),
            "–" if (first := sampled.first_step(config.threshold)) is None else str(first),
            _number(here["entropy"].mean(), 3),
            _number(here["length"].mean(), 1),
            _number(here["kl_exposure"].mean(), 2),
            _percent(here["coverage"].mean()),
            *map(_percent, elsewhere),
            *mean,
        ]
        yield "| " + " | ".join(cells) + " |"


def _difference(
    config: StudyConfig, answers: pl.DataFrame, ablation: str, method: str, against: str | None
) -> str:
    """Of final pass rates, to another arm with the same seeds; a dash where there is none."""
    main, first = next(iter(config.splits)), next(iter(config.ablations))
    table = ablation if against or _REFERENCE in config.ablations[ablation] else first
    other = against or _REFERENCE
    if other not in config.ablations[table] or (table, other) == (ablation, method):
        return "–"
    if not against and method in {arm.against for arm in config.ablations[ablation].values()}:
        return "–"  # this table's arms are compared with it: it may be of another base
    own = _of(answers, ablation, method)
    theirs = _of(answers, table, other).filter(pl.col("seed").is_in(own["seed"].unique().to_list()))
    finals = [curves(rows, main, SAMPLED).final for rows in (own, theirs)]
    if finals[0].shape != finals[1].shape:
        return "–"
    points = _points(bootstrap(finals[0] - finals[1], config.bootstrap))
    return f"{points} to {against}" if against else points


def _exposure(config: StudyConfig, answers: pl.DataFrame, ablation: str) -> Iterator[str]:
    """Change of the pass rate on the splits but the main one, from before to after."""
    _, *others = config.splits
    yield (
        "How far the sampled pass rate moved on the splits that training never asks, from before the "
        "first step to after the last, in percentage points."
    )
    yield ""
    yield "| arm | Σλ² | " + " | ".join(others) + " |"
    yield "|" + "---|" * (len(others) + 2)
    for method in config.ablations[ablation]:
        own = _of(answers, ablation, method)
        cells = [method, f"{own['kl_exposure'].max():.2f}"]
        for split in others:
            rates = curves(own, split, SAMPLED).rates
            cells.append(_points(bootstrap(rates[:, -1] - rates[:, 0], config.bootstrap)))
        yield "| " + " | ".join(cells) + " |"


def _mechanism(config: StudyConfig, rows: pl.DataFrame, files: str) -> Iterator[str]:
    seeds, tokens = rows["seed"].n_unique(), rows.group_by("seed").first()
    yield (
        f"One optimiser step from the base, as {config.mechanism} of the first table is set, on a run's "
        f"own first rollouts, {seeds} seeds: {tokens['key_tokens'].mean():.0f} key tokens a seed, of which "
        f"the teacher with the label supports {tokens['supported_tokens'].mean():.0f}. Lift: rise of the "
        "log-probability of those supported tokens; to right, to wrong: change of KL(teacher ‖ student) for "
        "the teacher with the right type and with another; nats, mean ± standard deviation over seeds; "
        "clipped: share of the KL's tokens at which the clip bound "
        f"([{files}/mechanism.parquet]({files}/mechanism.parquet))."
    )
    yield ""
    yield "| one step of | lift | to right | to wrong | clipped |"
    yield "|---|---|---|---|---|"
    for (objective,), own in rows.group_by("objective", maintain_order=True):
        cells = [str(objective)]
        for column in ("lift", "to_right", "to_wrong"):
            spread = own[column].std() if seeds > 1 else 0.0
            cells.append(f"{own[column].mean():+.4f} ± {spread:.4f}")
        cells.append(_percent(own["kl_clipped"].mean()))
        yield "| " + " | ".join(cells) + " |"


def _reported(reported: ReportedConfig) -> Iterator[str]:
    columns = list(dict.fromkeys(c for row in reported.rows.values() for c in row))
    yield f"{reported.source}. Another model, other problems: beside, not instead."
    yield ""
    yield "| | " + " | ".join(columns) + " |"
    yield "|" + "---|" * (len(columns) + 1)
    for name, row in reported.rows.items():
        cells = [f"{row[column]:g}" if column in row else "–" for column in columns]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _choices(
    config: StudyConfig, results: pl.DataFrame, tuning: pl.DataFrame, files: str
) -> Iterator[str]:
    first, *later = config.ablations
    own = results.filter(pl.col("ablation") == first)
    chosen = dict(own.select("method", "choice").iter_rows())
    assert config.tuning is not None
    choices = [" ".join(choice) for choice in config.tuning.choices]
    yield (
        "Sampled pass rate on the problems that tune, mean over looks, one seed; the chosen one in bold "
        f"([{files}/tuning.parquet]({files}/tuning.parquet))."
    )
    yield ""
    yield "| arm | " + " | ".join(f"`{choice}`" for choice in choices) + " |"
    yield "|" + "---|" * (len(choices) + 1)
    for method in config.ablations[first]:
        cells = [_percent(tuning_rate(tuning, method, choice)) for choice in choices]
        best = choices.index(chosen[method])
        cells[best] = f"**{cells[best]}**"
        yield f"| {method} | " + " | ".join(cells) + " |"
    like = [name for name in later if any(arm.like for arm in config.ablations[name].values())]
    if later:
        yield ""
        yield (
            f"Arms of {', '.join(like)} take the choice of the arm of {first} that they are like; those of "
            "other tables run as configured."
            if like
            else "Arms of later tables run as configured."
        )


def _percent(value: object) -> str:
    return f"{value:.1%}".replace("%", " %") if isinstance(value, float) else "–"


def _number(value: object, places: int) -> str:
    return f"{value:.{places}f}" if isinstance(value, float) else "–"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _points(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
