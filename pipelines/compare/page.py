"""The output of `trace-opd compare`: Parquet, one HTML page, tables in the terminal.

The command line calls `write` and `show`. The page contains its style and loads nothing; its
content security policy allows no script.
"""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from ...data.atomic import write_atomic
from ...data.store import Store, content_hash
from ...schemas.conversation import COLUMN, shown_row
from ...schemas.labels import AnnotationStatus
from ..terminal import visible
from ..viewer.page import csp_hash, page_template
from ..viewer.rollout_tables import find_tables
from .agreement import FIGURES
from .compare import SCOPES, Comparison
from .marks import TYPES

Row = dict[str, Any]

_HERE = Path(__file__).parent
PROBLEMS_SHOWN = 20
PROBLEM_CHARS = 240
# Figure: label and a short explanation.
LABELS = {
    "kappa": ("κ", "Cohen's kappa over {unit}"),
    "iou": ("IoU", "marked by both over marked by either"),
    "capped_kappa": ("κ, capped", "after the α cap: what training sees"),
    "capped_iou": ("IoU, capped", "after the α cap"),
    "segment_precision": ("segment precision", "of the other's segments, marked by the reference"),
    "segment_recall": ("segment recall", "of the reference's segments, marked by the other"),
    "segment_f1": ("segment F1", "their harmonic mean"),
    "type_agreement": ("same type", "of rollouts that both give a type"),
    "wrong_accuracy": ("first error found", "of rollouts in which the reference sees one"),
    "right_accuracy": ("“no error” said", "of rollouts in which the reference sees none"),
    "first_error_f1": ("first-error F1", "their harmonic mean, as in ProcessBench"),
}


def default_output(comparison: Comparison, store: Store) -> Path:
    """A folder in the store, the same for the same request.

    Raises:
        InputError: the store is not local.
    """
    refs = [dataset.ref for dataset in comparison.datasets.values()]
    return store.files.local_path(f"compare/{content_hash([refs, comparison.alpha])}")


def write(comparison: Comparison, table: pa.Table, store: Store, output: Path) -> list[Path]:
    """Write comparisons.parquet and compare.html into a folder; return their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / "comparisons.parquet", output / "compare.html"]
    columns = io.BytesIO()
    pq.write_table(table, columns, compression="zstd")
    write_atomic(paths[0], columns.getvalue())
    write_atomic(paths[1], page(comparison, table, store).encode())
    return paths


# --- terminal ------------------------------------------------------------------------------------


def show(comparison: Comparison, table: pa.Table, console: Console) -> None:
    """Print each pair's figures with 95 % intervals, and each annotator's answers and cost."""
    console.print(summary_line(comparison), soft_wrap=True, highlight=False)
    for scopes in pair_rows(comparison, table):
        total = scopes["all"]
        title = f"{total['other']} against {total['reference']}"
        shown = Table(title, *SCOPES, box=None, title_justify="left")
        for name in ("judged", "both_empty"):
            shown.add_row(name.replace("_", " "), *(f"{scopes[s][name]:,}" for s in SCOPES))
        for name in FIGURES:
            cells = [estimate(scopes[scope], name) for scope in SCOPES]
            if any(cell != "–" for cell in cells):
                shown.add_row(LABELS[name][0], *cells)
        console.print()
        console.print(shown, highlight=False)
    console.print()
    console.print(_annotator_table(comparison, table), highlight=False)


def _annotator_table(comparison: Comparison, table: pa.Table) -> Table:
    facts = annotators(comparison, table)
    shown = Table("annotator", *facts, box=None)
    for index, (label, _) in enumerate(next(iter(facts.values()))):
        shown.add_row(label, *(rows[index][1] for rows in facts.values()))
    return shown


def data(comparison: Comparison, table: pa.Table) -> dict[str, Any]:
    """The overall rows of the table (schemas/results.py) and what they cover, for --json."""
    return {
        "unit": comparison.unit,
        "unit_reason": comparison.unit_reason or None,
        "rollouts": comparison.common,
        "problems": len(comparison.problem_ids),
        "alpha": comparison.alpha,
        "datasets": {name: dataset.ref for name, dataset in comparison.datasets.items()},
        "pairs": [row for scopes in pair_rows(comparison, table) for row in scopes.values()],
    }


# --- shared by both ------------------------------------------------------------------------------


def summary_line(comparison: Comparison) -> str:
    rows = ", ".join(f"{name} {dataset.rows:,}" for name, dataset in comparison.datasets.items())
    unit = f"counted in {comparison.unit}"
    if comparison.unit_reason:
        unit += f" ({comparison.unit_reason})"
    problems = len(comparison.problem_ids)
    return (
        f"{comparison.common:,} rollouts of {problems:,} problems in common ({rows}); {unit}; "
        f"α {comparison.alpha:g}"
    )


def pair_rows(comparison: Comparison, table: pa.Table) -> list[dict[str, Row]]:
    """The overall rows of each pair, by scope."""
    overall = table.filter(pc.is_null(table["problem_id"])).to_pylist()
    by_key = {(row["reference"], row["other"], row["kind"]): row for row in overall}
    return [
        {scope: by_key[pair.reference, pair.other, scope] for scope in SCOPES}
        for pair in comparison.pairs
    ]


def estimate(row: Row, name: str) -> str:
    """A figure with its interval; – if it is undefined."""
    if row[name] is None:
        return "–"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:z.3f}" + (f" ({low:z.3f} – {high:z.3f})" if low is not None else "")


def annotators(comparison: Comparison, table: pa.Table) -> dict[str, list[tuple[str, str]]]:
    """Each annotator's answers and cost over the common rollouts: (label, value) by name."""
    facts = {}
    for scopes in pair_rows(comparison, table):
        for side in ("reference", "other"):
            facts.setdefault(scopes["all"][side], _facts(scopes["all"], side))
    return {name: facts[name] for name in comparison.datasets}


def _facts(row: Row, side: str) -> list[tuple[str, str]]:
    own = {name.removeprefix(f"{side}_"): value for name, value in row.items()}
    tokens = own["prompt_tokens"], own["completion_tokens"]
    facts = [(status.value, f"{own[status.value]:,}") for status in AnnotationStatus]
    facts += [
        ("coverage", _share(own["coverage"])),
        ("coverage, capped", _share(own["capped_coverage"])),
        ("cap hits", f"{own['cap_hits']:,}"),
        ("tokens", "unknown" if None in tokens else f"{sum(tokens):,.0f}"),
        ("cost", "unknown" if own["cost_usd"] is None else f"${own['cost_usd']:,.4f}"),
    ]
    return facts


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


# --- page ----------------------------------------------------------------------------------------


def page(comparison: Comparison, table: pa.Table, store: Store) -> str:
    """The comparison as one HTML page."""
    style = (_HERE / "compare.css").read_text(encoding="utf-8")
    return page_template(_HERE / "compare.html.j2").render(
        names=list(comparison.datasets),
        summary=summary_line(comparison),
        scopes=SCOPES,
        figures={
            name: (label, what.format(unit=comparison.unit))
            for name, (label, what) in LABELS.items()
        },
        pairs=[_pair(comparison, table, store, scopes) for scopes in pair_rows(comparison, table)],
        annotators=annotators(comparison, table),
        datasets={name: dataset.ref for name, dataset in comparison.datasets.items()},
        estimate=estimate,
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=csp_hash(style),
    )


def _pair(
    comparison: Comparison, table: pa.Table, store: Store, scopes: dict[str, Row]
) -> dict[str, Any]:
    total = scopes["all"]
    problems = table.filter(
        (pc.field("reference") == total["reference"])
        & (pc.field("other") == total["other"])
        & (pc.field("kind") == "all")
        & pc.field("problem_id").is_valid()
    )
    overlaps = problems.filter(pc.is_valid(problems["iou"]))
    least = overlaps.sort_by([("iou", "ascending"), ("units", "descending")])
    worst = least.slice(0, PROBLEMS_SHOWN).to_pylist()
    texts = _problem_texts(comparison, store, [row["problem_id"] for row in worst])
    return {
        "scopes": scopes,
        "types": _matrix(total["confusion"]),
        "problems": [(row, texts.get(row["problem_id"], "")) for row in worst],
        "problem_count": len(problems),
    }


def _matrix(cells: list[Row]) -> tuple[list[str], list[tuple[str, list[tuple[int, int]]]]]:
    """The types that occur, and per type of the reference a row of (rollouts, shade 0 to 9)."""
    counts = {(cell["reference_type"], cell["other_type"]): cell["rollouts"] for cell in cells}
    used = [str(label) for label in TYPES if any(label in pair for pair in counts)]
    rows = []
    for label in used:
        values = [counts.get((label, other), 0) for other in used]
        total = sum(values)
        rows.append((label, [(n, round(9 * n / total) if total else 0) for n in values]))
    return used, rows


def _problem_texts(comparison: Comparison, store: Store, ids: list[str]) -> dict[str, str]:
    lead = comparison.datasets[comparison.reference]
    problems = find_tables(lead, store).by_role["problems"]
    wanted = pa.array(ids, pa.string())
    texts: dict[Any, Any] = {}
    for part in range(problems.parts):
        rows = problems.read_part(part, ["problem_id", "problem", COLUMN])
        rows = rows.filter(pc.is_in(rows["problem_id"], value_set=wanted))
        texts |= {row["problem_id"]: shown_row(row) for row in rows.to_pylist()}
    return {key: visible(_cut(text)) for key, text in texts.items()}


def _cut(text: str) -> str:
    return text if len(text) <= PROBLEM_CHARS else text[:PROBLEM_CHARS].rstrip() + "…"
