"""Curves of train runs over steps: pass rates, any metric, coverage, and exposure Σλ².

Pass rates of validations have 95 % intervals over seeds and problems (statistics.py). A metric of
metrics.jsonl is the mean over a group's seeds, with the range of its runs as the band.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from ...schemas.errors import InputError
from ..training.validation import SAMPLED, read_validation
from ..viewer.training_curves import named_metric
from .groups import Group
from .lines import Line, Panel, draw_line, draw_panels, finish_axes, has_bands, shared_legend
from .rates import Curves, curves
from .style import MARKERS, MUTED, caption, new_figure, style_of

_RESAMPLES = 2000
_BY_STEP = "optimiser steps"


def draw_curves(groups: Sequence[Group], metrics: Sequence[str] = ()) -> Any:
    """Metrics by name; without any, the pass rate on each validated split, or while training.

    Raises:
        InputError: no run has a metric of that name.
    """
    if metrics:
        panels = [_metric_panel(groups, name) for name in metrics]
        return _with_ranges(groups, panels)
    splits = _splits(groups)
    if not splits:
        return _with_ranges(groups, [_metric_panel(groups, "pass_rate")])
    panels = [
        Panel(f"Pass rate on {split}", "sampled pass rate", _rates(groups, split), share=True)
        for split in splits
    ]
    figure = draw_panels(panels)
    several = any(len(group.runs) > 1 for group in groups)
    over = "seeds and problems" if several else "problems"
    caption(figure, intervals_caption(panels, over))
    return figure


def intervals_caption(panels: Sequence[Panel], over: str) -> str:
    """What the bands or bars of pass rates are. over: what the bootstrap draws."""
    if has_bands(panels[0].lines):
        return f"bands: 95 % intervals, bootstrap over {over}"
    if len(panels) > 1:
        return f"means over {over}"
    return f"bars: 95 % intervals after the last step, bootstrap over {over}"


def draw_coverage(groups: Sequence[Group]) -> Any:
    """The share of response tokens that each action got, by step.

    Raises:
        InputError: no run has routed tokens.
    """
    panels = []
    for name in _names(groups):
        action = name.removeprefix("coverage_")
        panel = _metric_panel(groups, name) if action != name else None
        if panel is not None and any(np.nanmax(line.values) > 0 for line in panel.lines):
            title, unit = f"Tokens under {action}", "share of response tokens"
            panels.append(Panel(title, unit, panel.lines, share=True))
    if not panels:
        raise InputError(
            f"{_all(groups)}: no step has routed tokens, so there is no coverage to draw; name "
            "runs with a divergence"
        )
    return _with_ranges(groups, panels)


def draw_exposure(groups: Sequence[Group]) -> Any:
    """Σλ² over steps; of validated runs also against the change of their pass rates."""
    panel = _metric_panel(groups, "kl_exposure")
    if not (splits := _splits(groups)):
        return _with_ranges(groups, [panel])
    figure, axes = new_figure(1, 2, 3.4)
    labels = [line.label for line in panel.lines]
    for line in panel.lines:
        draw_line(axes[0], line, labels.index(line.label))
    finish_axes(axes[0], "Exposure over training", "Σλ²", share=False)
    axes[0].set_xlabel(_BY_STEP)
    _draw_changes(axes[1], groups, splits, labels)
    shared_legend(figure, labels)
    caption(figure, "bars: 95 % intervals of the change, bootstrap over seeds and problems")
    return figure


def _draw_changes(
    axes: Any, groups: Sequence[Group], splits: Sequence[str], labels: Sequence[str]
) -> None:
    """A point per group and split, with its interval."""
    for group in groups:
        exposure = np.mean([steps[-1]["kl_exposure"] for steps in group.metrics])
        for number, split in enumerate(splits):
            found = curves(_answers(group), split, SAMPLED).change(_RESAMPLES)
            value, low, high = (100 * x for x in (found.value, found.low, found.high))
            axes.errorbar(
                [exposure], [value], [[value - low], [high - value]],
                color=style_of(labels.index(group.label))["color"],
                marker=MARKERS[number % len(MARKERS)], markersize=5.5, elinewidth=1.1,
                label=split if group is groups[0] else None,
            )  # fmt: skip
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_title("Change of the pass rate")
    axes.set_xlabel("Σλ² of the run")
    axes.set_ylabel("percentage points")
    axes.margins(x=0.12)
    if len(splits) > 1:
        axes.legend(fontsize=8, title="split", title_fontsize=8)


# --- lines ---------------------------------------------------------------------------------------


def _splits(groups: Sequence[Group]) -> list[str]:
    """The splits that every run was validated on, in the first run's order."""
    if not all(group.validated for group in groups):
        return []
    kept = [run.manifest["config"]["validation"]["problems"] for g in groups for run in g.runs]
    return [split for split in kept[0] if all(split in one for one in kept)]


def _rates(groups: Sequence[Group], split: str) -> list[Line]:
    found = []
    for group in groups:
        own = curves(_answers(group), split, SAMPLED)
        found.append(rate_line(group.label, own))
    return found


def rate_line(label: str, own: Curves, resamples: int = _RESAMPLES) -> Line:
    """A group's mean pass rate with its interval."""
    return Line(label, own.steps, own.mean, *own.intervals(resamples))


def _answers(group: Group) -> pl.DataFrame:
    """The validations of a group's runs, with a column seed that numbers the runs."""
    tables = [pl.DataFrame(read_validation(run)) for run in group.runs]
    return pl.concat(
        [table.with_columns(seed=pl.lit(number)) for number, table in enumerate(tables)]
    )


def _names(groups: Sequence[Group]) -> list[str]:
    """Every metric's name, in the order of the first step that has it."""
    steps = (step for group in groups for run in group.metrics for step in run)
    return list(dict.fromkeys(name for step in steps for name in step))


def _metric_panel(groups: Sequence[Group], name: str) -> Panel:
    lines = [line for group in groups if (line := _metric_line(group, name)) is not None]
    if not lines:
        numbers = ", ".join(one for one in _names(groups) if one != "step")
        raise InputError(f"{_all(groups)}: no step has the metric {name!r}; there are {numbers}")
    title, unit = named_metric(name)
    share = unit.startswith("share")
    return Panel(title, unit or name.replace("_", " "), lines, share)


def _metric_line(group: Group, name: str) -> Line | None:
    """The mean over the runs that have the metric at a step, and their range."""
    runs = [{step["step"]: step.get(name) for step in run} for run in group.metrics]
    steps = sorted({step for run in runs for step in run})
    values = np.array([[_number(run.get(step)) for step in steps] for run in runs])
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return None
    values, done = values[:, known], np.array(steps)[known] + 1  # steps count from 0
    if len(runs) == 1:
        return Line(group.label, done, values[0])
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return Line(group.label, done, np.nanmean(values, axis=0), low, high)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _with_ranges(groups: Sequence[Group], panels: Sequence[Panel]) -> Any:
    figure = draw_panels(panels)
    if any(len(group.runs) > 1 for group in groups):
        bands = has_bands(panels[0].lines)
        where = "bands" if bands else "bars, after the last step" if len(panels) == 1 else ""
        range_ = f"; {where}: from the lowest seed to the highest" if where else ""
        caption(figure, f"lines: means over seeds{range_}")
    return figure


def _all(groups: Sequence[Group]) -> str:
    return ", ".join(group.label for group in groups)
