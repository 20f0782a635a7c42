"""The output of `trace-opd compare` on verdicts: Parquet, one HTML page, tables in the terminal.

The page contains its style and loads nothing; its content security policy allows no script.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from ...data.atomic import write_atomic
from ...data.store import Store, content_hash
from ..terminal import visible
from ..viewer.page import csp_hash, page_template
from .page import PROBLEM_CHARS, PROBLEMS_SHOWN, estimate
from .verdicts import FIGURES, VerdictComparison, overall_rows

Row = dict[str, Any]

_HERE = Path(__file__).parent
LABELS = {
    "accuracy": ("accuracy", "equal verdicts, of the responses that both judge"),
    "kappa": ("κ", "Cohen's kappa of right and wrong"),
    "right_accuracy": ("right found", "of responses right by the reference, called right"),
    "wrong_accuracy": ("wrong found", "of responses wrong by the reference, called wrong"),
}
COUNT_LABELS = {
    "both_right": "both right",
    "both_wrong": "both wrong",
    "reference_right": "right by the reference alone",
    "other_right": "right by the other alone",
    "only_reference": "unscored by the other",
    "only_other": "unscored by the reference",
    "neither": "unscored by both",
}


def default_output(comparison: VerdictComparison, store: Store) -> Path:
    """A folder in the store, the same for the same request.

    Raises:
        InputError: the store is not local.
    """
    named = {name: dataset.ref for name, dataset in comparison.datasets.items()}
    about = ["verdicts", list(named.items()), comparison.correct_at]
    return store.files.local_path(f"compare/{content_hash(about)}")


def write(comparison: VerdictComparison, table: pa.Table, output: Path) -> list[Path]:
    """Write comparisons.parquet and compare.html into a folder; return their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / "comparisons.parquet", output / "compare.html"]
    columns = io.BytesIO()
    pq.write_table(table, columns, compression="zstd")
    write_atomic(paths[0], columns.getvalue())
    write_atomic(paths[1], page(comparison, table).encode())
    return paths


def show(comparison: VerdictComparison, table: pa.Table, console: Console) -> None:
    """Print each pair's counts, and its figures with 95 % intervals."""
    console.print(summary_line(comparison), soft_wrap=True, highlight=False)
    for row in overall_rows(table):
        title = f"{row['other']} against {row['reference']}"
        shown = Table(title, "", box=None, title_justify="left")
        for name, label in COUNT_LABELS.items():
            shown.add_row(label, f"{row[name]:,}")
        for name in FIGURES:
            shown.add_row(LABELS[name][0], estimate(row, name))
        console.print()
        console.print(shown, highlight=False)
    console.print()
    judges = Table("verdicts", *comparison.datasets, box=None)
    for label, values in _facts(comparison).items():
        judges.add_row(label, *values)
    console.print(judges, highlight=False)


def data(comparison: VerdictComparison, table: pa.Table) -> dict[str, Any]:
    """The overall rows of the table and what they cover, for --json."""
    return {
        "rollouts": comparison.common,
        "problems": len(comparison.problem_ids),
        "correct_at": comparison.correct_at,
        "datasets": {name: dataset.ref for name, dataset in comparison.datasets.items()},
        "pairs": overall_rows(table),
    }


def summary_line(comparison: VerdictComparison) -> str:
    at = comparison.correct_at
    parts = "" if at is None else f"; parts of {_ref(comparison)}, right from {at:g} on"
    problems = len(comparison.problem_ids)
    return f"{comparison.common:,} rollouts of {problems:,} problems in common{parts}"


def _ref(comparison: VerdictComparison) -> str:
    return comparison.datasets[comparison.reference].ref


def _facts(comparison: VerdictComparison) -> dict[str, list[str]]:
    """Right, wrong and unscored rollouts by name of what judges."""
    columns = comparison.right.values()
    return {
        "right": [f"{np.count_nonzero(column == 1):,}" for column in columns],
        "wrong": [f"{np.count_nonzero(column == 0):,}" for column in columns],
        "unscored": [f"{np.count_nonzero(np.isnan(column)):,}" for column in columns],
    }


def page(comparison: VerdictComparison, table: pa.Table) -> str:
    """The comparison as one HTML page."""
    style = (_HERE / "compare.css").read_text(encoding="utf-8")
    return page_template(_HERE / "verdicts.html.j2").render(
        names=list(comparison.datasets),
        datasets={name: dataset.ref for name, dataset in comparison.datasets.items()},
        summary=summary_line(comparison),
        facts=_facts(comparison),
        counts=COUNT_LABELS,
        figures=LABELS,
        pairs=[(row, _problems(comparison, table, row)) for row in overall_rows(table)],
        estimate=estimate,
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=csp_hash(style),
    )


def _problems(comparison: VerdictComparison, table: pa.Table, pair: Row) -> list[tuple[Row, str]]:
    """The problems on which the two differ most, with their texts."""
    own = table.filter(
        (pc.field("reference") == pair["reference"])
        & (pc.field("other") == pair["other"])
        & pc.field("problem_id").is_valid()
        & (pc.field("accuracy") < 1)
    )
    worst = own.sort_by([("accuracy", "ascending"), ("rollouts", "descending")])
    rows = worst.slice(0, PROBLEMS_SHOWN).to_pylist()
    texts = _texts(comparison, [row["problem_id"] for row in rows])
    return [(row, texts.get(row["problem_id"], "")) for row in rows]


def _texts(comparison: VerdictComparison, ids: list[str]) -> dict[str, str]:
    problems = comparison.datasets[comparison.reference].input("rollouts").input("problems")
    wanted, texts = pa.array(ids, pa.string()), {}
    for part in range(problems.parts if ids else 0):
        rows = problems.read_part(part, ["problem_id", "problem"])
        rows = rows.filter(pc.is_in(rows["problem_id"], value_set=wanted))
        texts |= dict(zip(rows["problem_id"].to_pylist(), rows["problem"].to_pylist(), strict=True))
    return {key: visible(_cut(text)) for key, text in texts.items()}


def _cut(text: str) -> str:
    return text if len(text) <= PROBLEM_CHARS else text[:PROBLEM_CHARS].rstrip() + "…"
