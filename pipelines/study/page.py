"""A study's page in Markdown (study.md.j2); study.py writes it.

Every figure on it comes from the study's Parquet files.
"""

from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...schemas.configs import ReportedConfig, StudyConfig
from ..plots.rates import curves, mean
from ..statistics import bootstrap_crossed
from ..training.validation import GREEDY, SAMPLED
from .bases import PROBLEMS, by_world
from .cells import LABELS, PLACES, dials, interval, number, percent, points, table
from .claims_page import claims_part
from .figures import of_arm, pass_rate, tuning_rate

_REFERENCE = "grpo"  # differences are to this arm of the same table, or of the first one


def page(
    config: StudyConfig,
    answers: pl.DataFrame,
    results: pl.DataFrame,
    mechanism: pl.DataFrame | None,
    tuning: pl.DataFrame | None,
    worlds: pl.DataFrame | None,
    files: str,
    comparisons: pl.DataFrame | None = None,
) -> str:
    """The page's text.

    tuning: results of the runs that tuned; worlds: figures of their bases; files: folder of the
    study's files, as the page links to it; comparisons: of the claims.
    """
    first, *later = config.ablations or [""]
    # The arms of later tables may start from other bases.
    base = answers.filter(step=0, decoding=SAMPLED, ablation=first)
    claims = None
    if comparisons is not None:
        assert worlds is not None, "each claim has a world"
        claims = claims_part(config, results, comparisons, worlds, mechanism)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701  Markdown of our own figures and config
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = percent
    return environment.get_template("study.md.j2").render(
        config=config,
        files=files,
        reference=_REFERENCE,
        runs=answers["run"].n_unique(),
        steps=answers["step"].max(),
        starts=[
            f"{split} {percent(pass_rate(base.filter(split=split)))}" for split in config.splits
        ],
        arms=partial(_arms, config, answers, results),
        exposure=partial(_exposure, config, answers),
        claims=claims,
        measured=PROBLEMS,
        worlds=_worlds(config, worlds) if worlds is not None and config.worlds else None,
        mechanism=None if mechanism is None else _mechanism(config, mechanism),
        tuning=None if tuning is None else _choices(config, results, tuning),
        like=[name for name in later if any(arm.like for arm in config.ablations[name].values())],
        reported=None if config.reported is None else _reported(config.reported),
    )


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
            greedy = f"{percent(means[0])} to {percent(means[-1])}"
        last = of_arm(results, ablation, method).filter(pl.col("step") == pl.col("step").max())
        last = last.filter(decoding=SAMPLED)
        here = last.filter(split=main)
        elsewhere = [last.filter(split=other)["pass_rate"].mean() for other in others]
        cells = [
            method,
            percent(sampled.mean[0]),
            interval(bootstrap_crossed(sampled.final, config.bootstrap)),
            _difference(config, answers, ablation, method, arm.against),
            greedy,
            percent(mean(sampled.area, (0, 1))),
            "–" if (first := sampled.first_step(config.threshold)) is None else str(first),
            number(here["entropy"].mean(), 3),
            number(here["length"].mean(), 1),
            number(here["kl_exposure"].mean(), 2),
            percent(here["coverage"].mean()),
            *map(percent, elsewhere),
        ]
        if config.mean:
            cells.append(percent(float(last["pass_rate"].to_numpy().mean())))
        rows.append(cells)
    return table(names, rows)


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
    found = points(bootstrap_crossed(finals[0] - finals[1], config.bootstrap))
    return f"{found} to {against}" if against else found


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
            cells.append(points(bootstrap_crossed(rates[:, -1] - rates[:, 0], config.bootstrap)))
        rows.append(cells)
    return table(["arm", "Σλ²", *others], rows)


def _worlds(config: StudyConfig, figures: pl.DataFrame) -> dict[str, str]:
    """Two tables: the dials that differ from the defaults, and what was measured of each base."""
    rows_of_dials = [[name, dials(world)] for name, world in config.worlds.items()]
    found = by_world(figures)
    rows = []
    for name in config.worlds:
        row = found[name]
        cells = [name, percent(row["pass_rate"]), percent(row["signal"])]
        cells += [percent(row.get(f"{label}_pass_rate")) for label in LABELS]
        cells += [number(row["tokens"], 0), number(row.get("right_label_tokens"), 0)]
        cells += [percent(row["at_once"]), percent(row.get("right_label_at_once"))]
        cells += [percent(row["right_at_once"])]
        cells += [number(row.get(f"right_label_{where}"), 4) for where in PLACES]
        cells += [number(row.get(f"wrong_label_{where}"), 4) for where in PLACES]
        rows.append(cells)
    names = ["world", "pass rate", "signal", "right label", "wrong label", "tokens", "hinted"]
    names += ["at once", "hinted", "right at once"]
    names += [f"KL {where}" for where in PLACES] + [f"wrong, {where}" for where in PLACES]
    return {"dials": table(["world", "dials"], rows_of_dials), "figures": table(names, rows)}


def _mechanism(config: StudyConfig, first_steps: pl.DataFrame) -> dict[str, Any] | None:
    """first_steps: a row per analysed run and objective; those of claims have their own tables."""
    if config.mechanism is None:
        return None
    steps = first_steps.filter(ablation=next(iter(config.ablations)))
    seeds, tokens = steps["seed"].n_unique(), steps.group_by("seed").first()
    rows = []
    for (objective,), own in steps.group_by("objective", maintain_order=True):
        cells = [str(objective)]
        for column in ("lift", "to_right", "to_wrong"):
            spread = f" ± {number(own[column].std(), 4)}" if seeds > 1 else ""
            cells.append(number(own[column].mean(), 4, "+") + spread)
        rows.append([*cells, percent(own["kl_clipped"].mean())])
    return {
        "seeds": seeds,
        "key_tokens": f"{tokens['key_tokens'].mean():.0f}",
        "supported_tokens": f"{tokens['supported_tokens'].mean():.0f}",
        "table": table(["one step of", "lift", "to right", "to wrong", "clipped"], rows),
    }


def _choices(config: StudyConfig, results: pl.DataFrame, tuning: pl.DataFrame) -> str:
    assert config.tuning is not None
    first = next(iter(config.ablations))
    chosen = dict(results.filter(ablation=first).select("method", "choice").iter_rows())
    choices = [" ".join(choice) for choice in config.tuning.choices]
    rows = []
    for method in config.ablations[first]:
        cells = [percent(tuning_rate(tuning, method, choice)) for choice in choices]
        best = choices.index(chosen[method])
        cells[best] = f"**{cells[best]}**"
        rows.append([method, *cells])
    return table(["arm", *(f"`{choice}`" for choice in choices)], rows)


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
    return table(["", *columns], rows)
