"""The figures of an annotations dataset, from its rows.

Stage annotate and online training call it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.labels import AnnotationStatus
from ..paid.spending import plus
from .attempts import UNANSWERED
from .rows import NO_ANSWER, Usage


def part_usage(table: pa.Table) -> tuple[int, Usage]:
    """A part's rows, and its tokens, US dollars and time; None where those of a row are unknown."""

    def total(name: str) -> Any:
        column = table[name]
        # One unknown makes the sum unknown, never too low.
        return None if column.null_count else pc.sum(column).as_py() or 0

    return len(table), Usage(*(total(field.name) for field in fields(Usage)))


def bearing(annotations: pa.Table, table: pa.Table) -> pa.Table:
    """The rows of a table with rollout ids whose annotations bear the cost of their answers."""
    answered = pc.is_valid(annotations["raw_answer"]).to_pylist()
    bears = [
        bool(has) and not shares
        for has, shares in zip(answered, _sharing(annotations), strict=True)
    ]
    ids = annotations["rollout_id"].filter(pa.array(bears, pa.bool_()))
    return table.filter(pc.is_in(table["rollout_id"], ids))


def summarize(tables: Iterator[pa.Table]) -> dict[str, Any]:
    """A dataset's figures, from its parts in order."""
    status: Counter[str] = Counter()
    types: Counter[str] = Counter()
    latencies: list[float] = []
    costs: list[float | None] = []
    parts: list[dict[str, Any]] = []
    total = Usage()
    marked = judged = unanswered = shared = reflected = 0
    for table in tables:
        rows, usage = part_usage(table)
        unanswered += table.filter(pc.starts_with(table["error"], NO_ANSWER)).num_rows
        parts.append({"rows": rows} | _tokens_and_cost(usage))
        total = plus(total, usage)
        if "reflection" in table.column_names:
            reflected += pc.count(table["reflection"]).as_py()
        sharing = _sharing(table)
        shared += sum(sharing)
        rest = table.drop_columns(["raw_answer", "error"]).to_pylist()
        for row, shares in zip(rest, sharing, strict=True):
            status[row["status"]] += 1
            if row["status"] == AnnotationStatus.SKIPPED:
                continue
            if row["diagnostic_type"] is not None:
                types[row["diagnostic_type"]] += 1
            judged += row["segments"][-1]["end"] if row["segments"] else 0
            marked += sum(span["end"] - span["start"] for span in row["spans"])
            if not shares:
                latencies.append(row["latency_s"])
                costs.append(row["cost_usd"])
    known = [cost for cost in costs if cost is not None]
    summary = {
        "status": dict(status.most_common()),
        "types": dict(types.most_common()),
        "marked_share": round(marked / judged, 4) if judged else None,
        **_tokens_and_cost(total),
        "cost_usd_per_row_median": median(known) if costs and len(known) == len(costs) else None,
        "latency_s_median": round(median(latencies), 4) if latencies else None,
        "per_part": parts,
    }
    if reflected:
        summary["reflections"] = reflected
    if unanswered:
        summary[UNANSWERED] = unanswered
    if shared:
        summary["rows_sharing_an_answer"] = shared
    return summary


def _tokens_and_cost(usage: Usage) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "cost_usd")
    return {name: getattr(usage, name) for name in names}


def _sharing(table: pa.Table) -> list[bool]:
    """(rows,): whether a row has the answer of an earlier row, which bears its tokens and cost."""
    names = ("prompt_tokens", "completion_tokens", "latency_s")
    used = zip(*(table[name].to_pylist() for name in names), strict=True)
    answered = pc.is_valid(table["raw_answer"]).to_pylist()
    return [bool(has) and all(n == 0 for n in row) for has, row in zip(answered, used, strict=True)]
