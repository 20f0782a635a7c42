"""`trace-opd pipeline`: the plan of all stages, then the stages, then the evaluation's table."""

from dataclasses import asdict
from typing import Any

import typer
from rich.table import Table

from ...data.store import Store
from ...schemas.configs import Config, PipelineConfig
from ..pipeline import run_pipeline, run_stage
from ..planning.pipeline_plan import PipelinePlan, plan_pipeline
from ..terminal import Terminal, console, is_quiet, print_data, say, warn
from .show import evaluation_table


def plan_and_run(
    config: PipelineConfig, store: Store, dry_run: bool, as_json: bool = False
) -> None:
    """Check everything, and run it unless this is a dry run.

    Raises:
        typer.Exit: with code 2, after all faults of the plan are printed.
    """
    plan = plan_pipeline(config, store, download=not dry_run)
    if dry_run and as_json:
        print_data(asdict(plan))
    elif dry_run:
        console.print(_plan_table(plan))
        for line in plan.notes:
            console.print(line, soft_wrap=True, highlight=False)
    for warning in plan.warnings:
        warn(warning)
    if plan.faults:
        errors = Terminal(stderr=True)
        for fault in plan.faults:
            errors.print(f"trace-opd: {fault}", soft_wrap=True, highlight=False)
        raise typer.Exit(2)
    if dry_run:
        return

    def run(stage: str, stage_config: Config, alias: str) -> str:
        result = run_stage(stage, stage_config, store, alias)
        ref = result if isinstance(result, str) else result.ref
        say(f"{alias}: {ref}")
        return ref

    made = run_pipeline(config, run)
    _print_result(config, made, store.get(made["evaluation"]).summary, as_json)


def _print_result(
    config: PipelineConfig, made: dict[str, str], evaluation: dict[str, Any], as_json: bool
) -> None:
    """made: refs by role, and the report's path."""
    if as_json:
        report = made.pop("report")
        print_data({"datasets": made, "report": report, "evaluation": evaluation})
    elif is_quiet():
        console.print(made["evaluation"], highlight=False)
    else:
        table = evaluation_table(evaluation)
        table.title = f"{config.name}-evaluation, with 95 % intervals"
        console.print(table)


def _plan_table(plan: PipelinePlan) -> Table:
    """A row per stage: what it reads, what it makes, how much is there, and what it takes."""
    table = Table("stage", "reads", "writes", "state", "rows", "takes", box=None)
    table.columns[4].justify = "right"
    for one in plan.stages:
        rows = "" if one.rows is None else f"{one.rows:,}"
        writes = one.alias if one.ref is None else f"{one.alias}: {one.ref}"
        table.add_row(one.stage, ", ".join(one.reads), writes, one.state, rows, one.takes)
    return table
