"""The claims' part of a study's page: tables and verdicts, in claims.md.j2. page.py takes it.

Every figure comes from the study's Parquet files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from ...schemas.configs import AxisConfig, ClaimConfig, ComparisonConfig, StudyConfig
from ...schemas.configs.claims import ENTROPY, TOKENS
from ..plots.estimates import resolved
from ..statistics import Estimate
from ..training.validation import SAMPLED
from .bases import by_world, point_world
from .cells import LABELS, PLACES, dials, number, percent, table
from .cells import difference as cell
from .claims import points_of
from .comparisons import difference, estimate_of, unit_of

_SHOWN = {"points": (100, 1), "tokens": (1, 1), "nats": (1, 4)}  # scale, decimal places
_LIFT_COLUMNS = ("lift", "to_right", "to_wrong")


@dataclass(frozen=True)
class Verdict:
    """Names of points by what the first comparison's interval says there."""

    holds: list[str]
    open: list[str]
    reversed: list[str]

    @property
    def sentence(self) -> str:
        parts = [("holds", self.holds), ("reversed", self.reversed), ("open", self.open)]
        found = [f"{word} at {_listed(names, self)}" for word, names in parts if names]
        text = "; ".join(found)
        return f"{text[0].upper()}{text[1:]}."

    @property
    def cells(self) -> list[str]:
        """Holds at, open at, reversed at: for the summary."""
        return [_listed(names, self) for names in (self.holds, self.open, self.reversed)]


def verdict(estimates: dict[str, Estimate]) -> Verdict:
    """estimates: of a claim's first comparison, by point. Without a figure a point is open."""
    found = Verdict([], [], [])
    for point, estimate in estimates.items():
        if not resolved(estimate):
            found.open.append(point)
        elif estimate.value > 0:
            found.holds.append(point)
        else:
            found.reversed.append(point)
    return found


def claims_part(
    config: StudyConfig,
    results: pl.DataFrame,
    comparisons: pl.DataFrame,
    worlds: pl.DataFrame,
    first_steps: pl.DataFrame | None,
) -> dict[str, Any]:
    """What the template takes: `summary`, and `sections`, a mapping per claim."""
    sections, summary = [], []
    for name, claim in config.claims.items():
        section = _section(config, name, results, comparisons, worlds, first_steps)
        sections.append(section)
        summary.append([f"[{claim.title}](#{anchor(claim.title)})", *section["verdict"].cells])
    names = ["claim", "holds at", "open at", "reversed at"]
    return {"summary": table(names, summary), "sections": sections}


def anchor(title: str) -> str:
    """The heading's link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _section(
    config: StudyConfig,
    name: str,
    results: pl.DataFrame,
    comparisons: pl.DataFrame,
    worlds: pl.DataFrame,
    first_steps: pl.DataFrame | None,
) -> dict[str, Any]:
    claim = config.claims[name]
    own = comparisons.filter(claim=name)
    found = {
        point: [estimate_of(row) for row in rows.to_dicts()]
        for (point,), rows in own.group_by("point", maintain_order=True)
    }
    seeds = len(config.seeds[: claim.seeds])
    lifts = None
    if claim.one_step is not None and first_steps is not None:
        lifts = _lifts(claim.one_step, first_steps.filter(ablation=name))
    return {
        "name": name,
        "claim": claim,
        "seeds": f"{seeds} seed{'s' if seeds > 1 else ''}",
        "dials": dials(claim.world),
        "axes": [_axis(axis) for axis in (claim.x, claim.y) if axis is not None],
        "bases": _bases(name, claim, worlds),
        "figures": _figures(config, claim, results.filter(ablation=name), found),
        "verdict": verdict({str(point): rows[0] for point, rows in found.items()}),
        "first": difference(claim.comparisons[0]),
        "lifts": lifts,
    }


def _axis(axis: AxisConfig) -> str:
    """What each point of an axis sets."""
    points = [
        f"{name} `{' '.join(overrides)}`" if overrides else name
        for name, overrides in axis.points.items()
    ]
    return f"{axis.label}: {', '.join(points)}"


def _bases(name: str, claim: ClaimConfig, worlds: pl.DataFrame) -> str:
    """A row per point: what was measured of its base."""
    figures = by_world(worlds)
    rows = []
    for point in points_of(name, claim):
        row = figures[point_world(name, point.name)]
        cells = [percent(row["pass_rate"]), percent(row["signal"])]
        cells += [percent(row.get(f"{label}_pass_rate")) for label in LABELS]
        cells += [number(row["tokens"], 0), number(row.get("right_label_tokens"), 0)]
        cells += [number(row.get(f"right_label_{where}"), 4) for where in PLACES]
        cells += [number(row.get(f"wrong_label_{where}"), 4) for where in PLACES[:2]]
        rows.append([point.name, *cells])
    names = ["point", "base", "signal", "right label", "wrong label", "tokens", "hinted"]
    names += [f"KL {where}" for where in PLACES] + [f"wrong, {where}" for where in PLACES[:2]]
    return table(names, rows)


def _figures(
    config: StudyConfig,
    claim: ClaimConfig,
    results: pl.DataFrame,
    found: dict[Any, list[Estimate]],
) -> str:
    """A row per point: what the arms reached, and the comparisons."""
    main = next(iter(config.splits))
    more = [of for of in (TOKENS, ENTROPY) if any(one.of == of for one in claim.comparisons)]
    names = ["point", "before", *claim.arms]
    names += [f"{of}, {arm}" for of in more for arm in _compared(claim, of)]
    names += [difference(one) for one in claim.comparisons]
    rows = []
    for point, estimates in found.items():
        here = results.filter(point=point, split=main, decoding=SAMPLED)
        last = here.filter(pl.col("step") == pl.col("step").max().over("method"))
        cells = [percent(here.filter(step=0)["pass_rate"].mean())]
        cells += [percent(last.filter(method=arm)["pass_rate"].mean()) for arm in claim.arms]
        for of, column, places in ((TOKENS, "length", 1), (ENTROPY, "entropy", 3)):
            for arm in _compared(claim, of):
                cells.append(number(last.filter(method=arm)[column].mean(), places))
        for comparison, estimate in zip(claim.comparisons, estimates, strict=True):
            cells.append(with_interval(estimate, comparison))
        rows.append([str(point), *cells])
    return table(names, rows)


def _compared(claim: ClaimConfig, of: str) -> list[str]:
    """The arms that a measure compares, in the claim's order."""
    named = {arm for one in claim.comparisons if one.of == of for arm in (one.higher, one.lower)}
    return [arm for arm in claim.arms if arm in named]


def with_interval(estimate: Estimate, comparison: ComparisonConfig) -> str:
    """A difference and its 95 % interval, bold where it excludes 0."""
    scale, places = _SHOWN[unit_of(comparison.of)]
    text = cell(estimate, scale, places)
    return f"**{text}**" if resolved(estimate) else text


def _lifts(arm: str, steps: pl.DataFrame) -> str:
    """A row per point and objective; steps: a claim's rows of the analysed arm."""
    rows = []
    for keys, own in steps.group_by("point", "objective", maintain_order=True):
        cells = [str(key) for key in keys]
        for column in _LIFT_COLUMNS:
            spread = f" ± {number(own[column].std(), 4)}" if len(own) > 1 else ""
            cells.append(number(own[column].mean(), 4, "+") + spread)
        cells += [percent(own["kl_clipped"].mean()), str(own["seed"].n_unique())]
        rows.append(cells)
    return table(["point", "one step of", "lift", "to right", "to wrong", "clipped", "seeds"], rows)


def _listed(names: Sequence[str], of: Verdict) -> str:
    """Names of points in a sentence or a cell."""
    if not names:
        return "–"
    if len(names) == len(of.holds) + len(of.open) + len(of.reversed) > 1:
        return "every point"
    # The name of a point of a map of two axes has a comma.
    return ", ".join(f"({name})" if ", " in name else name for name in names)
