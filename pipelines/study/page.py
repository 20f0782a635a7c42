"""A study's page in Markdown (study.md.j2); study.py writes it.

Every figure on it comes from the study's Parquet files.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...schemas.configs import ReportedConfig, StudyConfig, WorldConfig
from ..plots.rates import curves, mean
from ..statistics import Estimate, bootstrap_crossed
from ..training.validation import GREEDY, SAMPLED
from .figures import of_arm, pass_rate, tuning_rate

_LABELS = ("right_label", "wrong_label")
_PLACES = ("key", "error", "elsewhere")
_REFERENCE = "grpo"  # differences are to this arm of the same table, or of the first one


def page(
    config: StudyConfig,
    answers: pl.DataFrame,
    results: pl.DataFrame,
    mechanism: pl.DataFrame | None,
    tuning: pl.DataFrame | None,
    worlds: pl.DataFrame | None,
    files: str,
) -> str:
    """The page's text.

    tuning: results of the runs that tuned; worlds: figures of their bases; files: folder of the
    study's files, as the page links to it.
    """
    first, *later = config.ablations
    # The arms of later tables may start from other bases.
    base = answers.filter(step=0, decoding=SAMPLED, ablation=first)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701  Markdown of our own figures and config
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = _percent
    return environment.get_template("study.md.j2").render(
        config=config,
        files=files,
        reference=_REFERENCE,
        runs=answers["run"].n_unique(),
        steps=answers["step"].max(),
        starts=[
            f"{split} {_percent(pass_rate(base.filter(split=split)))}" for split in config.splits
        ],
        arms=partial(_arms, config, answers, results),
        exposure=partial(_exposure, config, answers),
        worlds=None if worlds is None else _worlds(config, worlds),
        mechanism=None if mechanism is None else _mechanism(mechanism),
        tuning=None if tuning is None else _choices(config, results, tuning),
        like=[name for name in later if any(arm.like for arm in config.ablations[name].values())],
        reported=None if config.reported is None else _reported(config.reported),
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = ("| " + " | ".join(names) + " |").replace("|  |", "| |")
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([header, "|" + "---|" * len(names), *lines])


def _arms(config: StudyConfig, answers: pl.DataFrame, results: pl.DataFrame, ablation: str) -> str:
    """The table of an ablation, a row per arm."""
    main, *others = config.splits
    names = ["arm", "before", "pass rate", f"− {_REFERENCE}", "greedy", "area", "steps", "entropy"]
    names += ["tokens", "Σλ²", "coverage", *others, *(["mean"] if config.mean else [])]
    assert config.train.validation is not None
    rows = []
    for method, arm in config.ablations[ablation].items():
        own = of_arm(answers, ablation, method)
        sampled = curves(own, main, SAMPLED)
        greedy = "–"
        if config.train.validation.greedy:
            means = curves(own, main, GREEDY).mean
            greedy = f"{_percent(means[0])} to {_percent(means[-1])}"
        last = of_arm(results, ablation, method).filter(pl.col("step") == pl.col("step").max())
        last = last.filter(decoding=SAMPLED)
        here = last.filter(split=main)
        elsewhere = [last.filter(split=other)["pass_rate"].mean() for other in others]
        cells = [
            method,
            _percent(sampled.mean[0]),
            _interval(bootstrap_crossed(sampled.final, config.bootstrap)),
            _difference(config, answers, ablation, method, arm.against),
            greedy,
            _percent(mean(sampled.area, (0, 1))),
            "–" if (first := sampled.first_step(config.threshold)) is None else str(first),
            _number(here["entropy"].mean(), 3),
            _number(here["length"].mean(), 1),
            _number(here["kl_exposure"].mean(), 2),
            _percent(here["coverage"].mean()),
            *map(_percent, elsewhere),
        ]
        if config.mean:
            cells.append(_percent(float(last["pass_rate"].to_numpy().mean())))
        rows.append(cells)
    return _table(names, rows)


def _difference(
    config: StudyConfig, answers: pl.DataFrame, ablation: str, method: str, against: str | None
) -> str:
    """Difference of final pass rates to another arm with the same seeds; a dash without one."""
    main, first = next(iter(config.splits)), next(iter(config.ablations))
    table = ablation if against or _REFERENCE in config.ablations[ablation] else first
    other = against or _REFERENCE
    if other not in config.ablations[table] or (table, other) == (ablation, method):
        return "–"
    if not against and method in {arm.against for arm in config.ablations[ablation].values()}:
        return "–"  # this table's arms are compared with it: it may be of another base
    own = of_arm(answers, ablation, method)
    seeds = own["seed"].unique().to_list()
    theirs = of_arm(answers, table, other).filter(pl.col("seed").is_in(seeds))
    finals = [curves(rows, main, SAMPLED).final for rows in (own, theirs)]
    if finals[0].shape != finals[1].shape:
        return "–"
    points = _points(bootstrap_crossed(finals[0] - finals[1], config.bootstrap))
    return f"{points} to {against}" if against else points


def _exposure(config: StudyConfig, answers: pl.DataFrame) -> str:
    """Change of the pass rate on the splits but the main one, from before to after."""
    assert config.exposure is not None
    _, *others = config.splits
    rows = []
    for method in config.ablations[config.exposure]:
        own = of_arm(answers, config.exposure, method)
        cells = [method, f"{own['kl_exposure'].max():.2f}"]
        for split in others:
            rates = curves(own, split, SAMPLED).rates
            cells.append(_points(bootstrap_crossed(rates[:, -1] - rates[:, 0], config.bootstrap)))
        rows.append(cells)
    return _table(["arm", "Σλ²", *others], rows)


def _worlds(config: StudyConfig, figures: pl.DataFrame) -> dict[str, str]:
    """Two tables: the dials that differ from the defaults, and what was measured of each base."""
    defaults = WorldConfig()
    dials = []
    for name, world in config.worlds.items():
        set_here = [
            f"{field} {value}" if isinstance(value, str) else f"{field} {value:g}"
            for field, value in world.model_dump().items()
            if value != getattr(defaults, field)
        ]
        dials.append([name, ", ".join(set_here) or "the defaults"])
    rows = []
    for row in figures.to_dicts():
        cells = [row["world"], _percent(row["pass_rate"]), _percent(row["signal"])]
        cells += [_percent(row.get(f"{label}_pass_rate")) for label in _LABELS]
        cells += [_number(row["tokens"], 0), _number(row.get("right_label_tokens"), 0)]
        cells += [_percent(row["at_once"]), _percent(row.get("right_label_at_once"))]
        cells += [_percent(row["right_at_once"])]
        cells += [_number(row.get(f"right_label_{where}"), 4) for where in _PLACES]
        cells += [_number(row.get(f"wrong_label_{where}"), 4) for where in _PLACES]
        rows.append(cells)
    names = ["world", "pass rate", "signal", "right label", "wrong label", "tokens", "hinted"]
    names += ["at once", "hinted", "right at once"]
    names += [f"KL {where}" for where in _PLACES] + [f"wrong, {where}" for where in _PLACES]
    return {"dials": _table(["world", "dials"], dials), "figures": _table(names, rows)}


def _mechanism(steps: pl.DataFrame) -> dict[str, Any]:
    """steps: a row per objective and seed."""
    seeds, tokens = steps["seed"].n_unique(), steps.group_by("seed").first()
    rows = []
    for (objective,), own in steps.group_by("objective", maintain_order=True):
        cells = [str(objective)]
        for column in ("lift", "to_right", "to_wrong"):
            spread = f" ± {_number(own[column].std(), 4)}" if seeds > 1 else ""
            cells.append(_number(own[column].mean(), 4, "+") + spread)
        rows.append([*cells, _percent(own["kl_clipped"].mean())])
    return {
        "seeds": seeds,
        "key_tokens": f"{tokens['key_tokens'].mean():.0f}",
        "supported_tokens": f"{tokens['supported_tokens'].mean():.0f}",
        "table": _table(["one step of", "lift", "to right", "to wrong", "clipped"], rows),
    }


def _choices(config: StudyConfig, results: pl.DataFrame, tuning: pl.DataFrame) -> str:
    assert config.tuning is not None
    first = next(iter(config.ablations))
    chosen = dict(results.filter(ablation=first).select("method", "choice").iter_rows())
    choices = [" ".join(choice) for choice in config.tuning.choices]
    rows = []
    for method in config.ablations[first]:
        cells = [_percent(tuning_rate(tuning, method, choice)) for choice in choices]
        best = choices.index(chosen[method])
        cells[best] = f"**{cells[best]}**"
        rows.append([method, *cells])
    return _table(["arm", *(f"`{choice}`" for choice in choices)], rows)


def _reported(reported: ReportedConfig) -> str:
    cells = {
        name: {
            column: f"{value:g} †" for column, value in reported.second_hand.get(name, {}).items()
        }
        | {column: f"{value:g}" for column, value in row.items()}
        for name, row in reported.rows.items()
    }
    # In the order of the row with most figures.
    columns = list(dict.fromkeys(c for row in sorted(cells.values(), key=len)[::-1] for c in row))
    rows = [[name, *(row.get(column, "–") for column in columns)] for name, row in cells.items()]
    return _table(["", *columns], rows)


def _percent(value: object) -> str:
    return "–" if _unknown(value) else f"{value:.1%}".replace("%", " %")


def _number(value: object, places: int, sign: str = "") -> str:
    return "–" if _unknown(value) else f"{value:{sign}.{places}f}"


def _unknown(value: object) -> bool:
    return not isinstance(value, float) or math.isnan(value)


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _points(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "–"
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
