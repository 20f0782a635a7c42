"""Figures over all rollouts of a dataset: the tiles and bars of the page that report_page.py
writes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.labels import AnnotationStatus, LeftOut, Route, Selection, VerdictStatus
from .distributions import Distribution, Distributions, of_parts, of_scores
from .rollout_index import SELECTION
from .rollout_tables import Tables

ANNOTATED = {
    AnnotationStatus.EMPTY: "nothing marked",
    AnnotationStatus.ABSTAINED: "the annotator declined",
    AnnotationStatus.INVALID: "the answer can't be read",
    AnnotationStatus.SKIPPED: "not asked (no reward, not selected, λ was 0, or the routing needs "
    "no annotation)",
    AnnotationStatus.FAILED: "no answer",
}
VERIFIED = {
    VerdictStatus.PRED_UNPARSED: "no answer in the response",
    VerdictStatus.TRUNCATED: "the response hit the token limit",
    VerdictStatus.GOLD_UNPARSED: "the gold answer can't be read",
    VerdictStatus.TIMEOUT: "the verifier took too long",
    VerdictStatus.OOM: "the verifier ran out of memory",
    VerdictStatus.ERROR: "the verifier failed",
    VerdictStatus.REFUSED: "the judge declined",
    VerdictStatus.INVALID: "the judge's answer has no grade that can be used",
    VerdictStatus.FAILED: "the judge did not answer",
}
SELECTED = {
    Selection.ANNOTATE: "an annotator is asked",
    Selection.PLAIN: "trained on as plain GRPO",
    Selection.DROP: "the group leaves training",
}
LEFT_OUT = {
    LeftOut.UNSCORED: "no verdict",
    LeftOut.ALL_RIGHT: "no response of the group is wrong",
    LeftOut.ALL_WRONG: "no response of the group is right",
    LeftOut.PASS_RATE: "the group's is outside select.pass_rate",
    LeftOut.TRUNCATED: "the response hit the token limit",
    LeftOut.LENGTH: "outside select.min_chars and max_chars",
    LeftOut.DUPLICATE: "an earlier response of the group has the same text",
    LeftOut.SOURCE: "beyond select.per_source",
    LeftOut.BUDGET: "beyond select.budget",
}


@dataclass(frozen=True)
class Bars:
    """A bar chart: labels with counts, the filter that a click on a bar sets, and what the labels
    mean."""

    title: str
    filter: str
    counts: list[tuple[str, int]]
    meanings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Overview:
    """Figures over all rollouts, including those that the page leaves out.

    tiles: (label, value, note). route_tokens: tokens of each route that occurs, None for a dataset
    that is not routed.
    """

    rollouts: int
    tiles: list[tuple[str, str, str]]
    bars: list[Bars]
    route_tokens: list[tuple[str, int]] | None
    distributions: list[Distribution] = field(default_factory=list)


def overview(tables: Tables, scores: Dataset | None = None) -> Overview:
    """Summarise a dataset's rollouts; reads only the columns that it needs.

    scores: a teacher's, of these rollouts.
    """
    lead = tables.lead
    marked = [name for name in ("routed", "annotations") if name in tables.by_role]
    rows = lead.read(["problem_id", "correct", *(["diagnostic_type"] if marked else [])])
    judged = [value for value in rows["correct"].to_pylist() if value is not None]
    lengths = _token_counts(tables)
    problems = pc.count_distinct(rows["problem_id"]).as_py()
    tiles = [
        ("rollouts", f"{lead.rows:,}", f"of {problems:,} problem{'' if problems == 1 else 's'}"),
        ("pass rate", _share(sum(judged), len(judged)), f"{sum(judged):,} of {len(judged):,}"),
        ("tokens per response", f"{np.mean(lengths):,.0f}" if len(lengths) else "–", "mean"),
    ]
    parts = of_parts(tables.by_role["verdicts"])
    scored = of_scores(scores) if scores is not None else Distributions()
    tiles += parts.tiles + scored.tiles
    bars = []
    if marked:
        bars.append(Bars("Diagnostic type", "type", _counts(rows["diagnostic_type"].to_pylist())))
    route_tokens = None
    if "routed" in tables.by_role:
        routed = lead.read(["coverage", "truncated", "dropped_tokens"])
        coverage = routed["coverage"].to_numpy()
        dropped = pc.sum(routed["dropped_tokens"]).as_py() or 0
        tiles += [
            (
                "coverage",
                f"{coverage.mean():.1%}" if len(coverage) else "–",
                f"mean; {dropped:,} marked tokens dropped",
            ),
            (
                "truncated",
                _share(pc.sum(routed["truncated"]).as_py() or 0, lead.rows),
                "hit the token limit",
            ),
        ]
        route_tokens = _route_tokens(lead)
    if "annotations" in tables.by_role:
        annotations = tables.by_role["annotations"].read(
            ["status", "cost_usd", "prompt_tokens", "completion_tokens"]
        )
        tiles.append(_cost_tile(annotations.to_pylist()))
        counts = _statuses(tables, "annotations")
        bars.append(Bars("Annotation", "status", counts, _meanings(counts, ANNOTATED)))
    if (selected := _selection_tile(tables.by_role["verdicts"])) is not None:
        tiles.append(selected)
        bars += _selection_bars(tables)
    counts = _statuses(tables, "verdicts")
    bars.append(Bars("Verdict", "verdict", counts, _meanings(counts, VERIFIED)))
    figures = parts.figures + scored.figures
    return Overview(lead.rows, tiles, [bar for bar in bars if bar.counts], route_tokens, figures)


def _selection_tile(verdicts: Dataset) -> tuple[str, str, str] | None:
    """What stage select left out and why; None for verdicts that it did not see."""
    if verdicts.stage != "select":
        return None
    figures = verdicts.summary
    reasons = ", ".join(f"{count:,} {why}" for why, count in figures["left_out"].items())
    return (
        "selected",
        f"{figures['selected']:,}",
        f"of {verdicts.rows:,}; left out: {reasons or 'none'}",
    )


def _selection_bars(tables: Tables) -> list[Bars]:
    """What becomes of the rollouts in the leading table, and why some are left out."""
    rows = _of_lead(tables, tables.by_role["verdicts"].read([*SELECTION, "rollout_id"]))
    counts = [_counts(rows[name].to_pylist()) for name in SELECTION]
    return [
        Bars("Selection", "selection", counts[0], _meanings(counts[0], SELECTED)),
        Bars("Left out of the selection", "left_out", counts[1], _meanings(counts[1], LEFT_OUT)),
    ]


def _cost_tile(rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """An unknown price is "unknown", never 0; an annotator without tokens costs nothing."""
    billed = [row for row in rows if row["prompt_tokens"] or row["completion_tokens"]]
    tokens = sum((row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0) for row in billed)
    if not billed:
        return "annotation cost", "none", "no tokens used"
    if any(row["cost_usd"] is None for row in billed):
        return "annotation cost", "unknown", f"{tokens:,} tokens, no price set"
    return (
        "annotation cost",
        f"${sum(row['cost_usd'] for row in billed):,.2f}",
        f"{tokens:,} tokens",
    )


def _token_counts(tables: Tables) -> np.ndarray:
    """Response lengths in tokens, of the rollouts with known token ids."""
    source = tables.by_role.get("routed", tables.by_role["rollouts"])
    lengths = [
        pc.list_value_length(source.read_part(part, ["token_ids"])["token_ids"]).to_numpy()
        for part in range(source.parts)
    ]
    counts = np.concatenate(lengths)
    return counts[counts > 0]


def _route_tokens(routed: Dataset) -> list[tuple[str, int]]:
    counts = np.zeros(len(Route), dtype=np.int64)
    for part in range(routed.parts):
        routes = pc.list_flatten(routed.read_part(part, ["route"])["route"]).to_numpy()
        counts += np.bincount(routes, minlength=len(Route))
    return [(route.name.lower(), int(counts[route])) for route in Route if counts[route]]


def _statuses(tables: Tables, role: str) -> list[tuple[str, int]]:
    """Statuses of the rollouts in the leading table: others have rows too, such as those of
    replaced groups."""
    table = tables.by_role[role].read(["rollout_id", "status"])
    return _counts(_of_lead(tables, table)["status"].to_pylist())


def _of_lead(tables: Tables, table: pa.Table) -> pa.Table:
    """The rows of the rollouts in the leading table."""
    lead = tables.lead.read(["rollout_id"])["rollout_id"]
    return table.filter(pc.is_in(table["rollout_id"], lead))


def _meanings(counts: list[tuple[str, int]], of: Mapping[Any, str]) -> list[str]:
    return [f"{label}: {of[label]}" for label, _ in counts if label in of]


def _counts(values: Iterable[str | None]) -> list[tuple[str, int]]:
    return Counter(value for value in values if value is not None).most_common()


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "–"
