"""`trace-opd evaluate --suite`: the benchmarks of a suite, and one table. commands.py calls it."""

from typing import Any

from rich.table import Table

from ...data.store import Dataset, Store
from ...schemas.configs import EvaluateConfig
from ..harness.suites import (
    Suite,
    begin,
    benchmarks,
    differences,
    evaluate_benchmark,
    make_problems,
    require_suite,
    suite_summary,
)
from ..terminal import console, print_config, print_data


def run_suite(
    name: str,
    config: EvaluateConfig,
    store: Store,
    alias: str | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool = False,
) -> None:
    """Evaluate on every benchmark of a suite, or print what that would do.

    alias: prefix of the evaluate datasets' names. limit: at most so many problems of each
    benchmark.

    Raises:
        InputError: no such suite, or a benchmark does not load.
    """
    suite = require_suite(name, config)
    prefix = alias or f"{name}-evaluation"
    notes = differences(suite, config)
    if dry_run and as_json:
        print_data({"config": config.model_dump(mode="json"), "differences": notes})
        return
    if dry_run:
        print_config(config)
    for line in () if as_json else notes:
        console.print(f"# {line}", soft_wrap=True, highlight=False)
    if dry_run:
        console.print(_plan(name, config, store, prefix, limit))
        return
    found = make_problems(name, store, limit)
    for one in found:  # faults of all show before the sampling
        begin(one, config, store)
    made = {}
    for one in found:
        made[one.preset] = evaluate_benchmark(one, config, store, prefix)
        if not as_json:
            console.print(f"{prefix}-{one.preset}: {made[one.preset].ref}", soft_wrap=True)
    left_out = {one.preset: one.left_out for one in found if one.left_out}
    summary = suite_summary(config, made)
    if as_json:
        refs = {preset: dataset.ref for preset, dataset in made.items()}
        data = {"datasets": refs, "left_out": left_out, "differences": notes}
        print_data(data | {"summary": summary})
        return
    console.print(suite_table(suite, summary))
    for preset, number in left_out.items():
        console.print(f"{preset}: {number} left out, whose gold answer does not parse")


def _plan(name: str, config: EvaluateConfig, store: Store, prefix: str, limit: int | None) -> Table:
    table = Table("benchmark", "problems", "responses", "writes", "state", box=None)
    table.columns[3].overflow = "fold"
    policies = 2 if config.trained is not None else 1
    for one in benchmarks(name, store, limit):
        alias = f"{prefix}-{one.preset}"
        if one.problems is None:
            rows = "all" if limit is None else f"first {limit}"
            rows += f" of {one.dataset}"
            table.add_row(one.preset, rows, "–", alias, "to be downloaded")
            continue
        plan, target = begin(one, config, store)
        there = 0 if isinstance(target, Dataset) else sum(map(target.has_part, range(plan.parts)))
        state = "finished" if isinstance(target, Dataset) else "to be made"
        if there:
            state += f", {there} of {plan.parts} parts are there"
        number = one.problems.rows
        responses = f"{policies * config.k * number:,}"
        table.add_row(one.preset, f"{number:,}", responses, f"{alias}: {target.ref}", state)
    return table


def suite_table(suite: Suite, summary: dict[str, Any]) -> Table:
    """A row per benchmark and policy, the unweighted means last; 95 % intervals."""
    rows = dict(summary["policies"])
    figures = [name for name in rows["base"] if "@" in name]
    if "paired_difference" in summary:
        rows["paired difference"] = summary["paired_difference"]
    table = Table("benchmark", "policy", *figures, box=None)
    for preset in suite.presets:
        for role, row in rows.items():
            own = row["sources"][preset]
            table.add_row(preset, role, *(_cell(own[name]) for name in figures))
    for role, row in rows.items():
        title = f"mean of {len(suite.presets)}"
        table.add_row(title, role, *(_cell(row[name]) for name in figures), style="bold")
    return table


def _cell(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "–"
    return "{:.1%} ({:.1%} – {:.1%})".format(estimate["value"], *estimate["ci95"])
