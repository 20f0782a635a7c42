"""Stage select, between verify and annotate: which responses to annotate, which groups to train on.

    trace-opd select verdicts=verdicts budget=5000
    trace-opd annotate configs/annotate.yaml verdicts=selection

Its dataset is the verdicts with two more columns, row by row as the rollouts are: no row leaves.
Stage annotate asks about the selected rows alone, and stage convert leaves the dropped groups out.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import polars as pl
import pyarrow as pa

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import SelectConfig
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason, LeftOut, Selection
from ...schemas.tables import VERDICTS
from ..choice.selection import counts_of, selection_of
from .base import PartMaker, Plan, Stage

_READ = ["rollout_id", "problem_id", "group_id", "correct"]
_OF_ROLLOUTS = ["rollout_id", "response", "finish_reason"]


def _resolve(config: SelectConfig, store: Store) -> Plan:
    verdicts = store.get(config.verdicts, VERDICTS)
    if verdicts.stage == "select":
        raise InputError(
            f"dataset {verdicts.ref} is a selection already; give the verdicts that it was made "
            f"from, {verdicts.manifest['inputs']['verdicts']}"
        )
    rollouts = verdicts.input("rollouts")
    if verdicts.parts != rollouts.parts:
        raise InputError(
            f"dataset {verdicts.ref} has {verdicts.parts} parts, its rollouts {rollouts.ref} have "
            f"{rollouts.parts}; make it again (`trace-opd import` for a table of your own)"
        )
    inputs = {
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    semantic = config.semantic()
    del semantic["verdicts"]  # the dataset's id stands for it
    return Plan(config, inputs, semantic, verdicts.parts, work=verdicts.part_rows)


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    """Balance and budget are over all parts, so the whole selection is made once, when opened."""
    verdicts = plan.inputs["verdicts"]
    parts = [_rows(plan, part) for part in range(plan.parts)]
    ends = pl.Series([0, *map(len, parts)]).cum_sum().to_list()
    chosen = selection_of(pl.concat(parts), plan.config) if parts else pl.DataFrame()

    def make(part: int) -> pa.Table:
        table = verdicts.read_part(part)
        own = chosen[ends[part] : ends[part + 1]].to_arrow()
        for name in own.column_names:
            if name in table.column_names:  # an imported table may have them
                table = table.drop_columns([name])
            table = table.append_column(name, own[name])
        return table

    yield make


def _rows(plan: Plan, part: int) -> pl.DataFrame:
    """What the criteria read of a part's responses."""
    verdicts = plan.inputs["verdicts"].read_part(part, _READ)
    rollouts = plan.inputs["rollouts"].read_part(part, _OF_ROLLOUTS)
    if not rollouts["rollout_id"].equals(verdicts["rollout_id"]):
        raise InputError(
            f"{plan.inputs['verdicts'].ref}, part {part}: holds other rollouts than "
            f"{plan.inputs['rollouts'].ref}; make it again"
        )
    rows: Any = pl.from_arrow(verdicts.select(["problem_id", "group_id", "correct"]))
    rows = rows.with_columns(
        pl.Series("response", rollouts["response"]),
        truncated=pl.Series(rollouts["finish_reason"]) == str(FinishReason.LENGTH),
    ).with_columns(
        chars=pl.col("response").str.len_chars(),
        duplicate=pl.int_range(pl.len()).over("group_id", "response") > 0,
    )
    problems: Any = pl.from_arrow(plan.inputs["problems"].read_part(part, ["problem_id", "source"]))
    return rows.drop("response").join(problems, on="problem_id", how="left", maintain_order="left")


def _digest(table: pa.Table) -> dict[str, Any]:
    found: Any = pl.from_arrow(table)
    return counts_of(found.select("group_id", "correct", "selection", "left_out"))


def _summarize(plan: Plan, digests: Iterator[dict[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    selection: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for one in digests:
        selection += one.pop("selection")
        left_out += one.pop("left_out")
        total.update(one)
    selected = total["selected"]
    return {
        "selected": selected,
        "selected_groups": total["selected_groups"],
        "groups": total["groups"],
        "pass_rate": total["right"] / selected if selected else None,
        "plain": selection[Selection.PLAIN],
        "dropped": selection[Selection.DROP],
        "left_out": {str(why): left_out[why] for why in LeftOut if left_out[why]},
    }


def _check(config: SelectConfig, dataset: Dataset) -> None:
    """Raises InputError if nothing is selected."""
    if dataset.summary["selected"]:
        return
    reasons = ", ".join(f"{count} {why}" for why, count in dataset.summary["left_out"].items())
    raise InputError(
        f"{dataset.ref} is finished, but none of its {dataset.rows} responses is selected "
        f"({reasons or 'it was made without rows'}); widen the criteria of select"
    )


def asked_rows(verdicts: Dataset) -> int:
    """How many rows of a verdicts dataset an annotator may be asked about.

    A selection that is not made yet counts all its rows, or its budget.
    """
    if verdicts.stage != "select":
        return verdicts.rows
    budget = verdicts.manifest["config"].get("budget")
    most = verdicts.rows if budget is None else min(budget, verdicts.rows)
    return verdicts.summary.get("selected", most)


STAGE = Stage(
    "select",
    SelectConfig,
    VERDICTS,
    _resolve,
    _open,
    _summarize,
    ("group_id", "correct", "selection", "left_out"),
    _digest,
    check=_check,
)
