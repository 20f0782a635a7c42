"""Stage report: one self-contained HTML file with a dataset's rollouts, token by token, or with two
annotators of the same rollouts side by side.

stages/report.py makes a stage of `run`. `trace-opd view` shows datasets of any size.
"""

from pathlib import Path
from typing import Any

from ...data.atomic import sweep_siblings, write_atomic
from ...data.store import Dataset, Store
from ...schemas.configs import ReportConfig
from .lineage_view import lineage_chain, lineage_entry
from .overview import overview
from .page import page_data, paint_names, render_page
from .rollout_index import RolloutIndex, build_index
from .rollout_tables import (
    Tables,
    annotator_labels,
    choose_groups,
    find_byte_table,
    find_counterpart,
    find_tables,
)
from .rollout_view import RolloutReader, RolloutView, rollout_data
from .training_curves import charts, metrics_of


def run(config: ReportConfig, store: Store, output: Path | None = None) -> Path:
    """Write the report of a routed or annotations dataset or of a train run; returns its path.

    output: HTML file; None: report.html, or against-<id>.html, in the dataset's folder. It is not
    in the config, so that someone else's config can write only inside the store.

    Raises:
        InputError: the dataset is of another kind, the second one annotates different rollouts, or
            the store is not local and no output is set.
    """
    dataset = store.get(config.dataset)
    tables = find_tables(dataset, store)
    against = find_counterpart(config.against, tables, store) if config.against else None
    output = output or _default_output(dataset, against, store)
    index = build_index(tables, against, choose_groups(tables.lead, config.limit))
    views = RolloutReader(tables, find_byte_table(dataset, tables), against).read(index.rows)
    html = _render(dataset, tables, against, index, views, metrics_of(dataset, store))
    write_atomic(output, html.encode())
    sweep_siblings(output)
    return output


def _default_output(dataset: Dataset, against: Dataset | None, store: Store) -> Path:
    name = f"against-{against.id}.html" if against is not None else "report.html"
    return store.files.local_path(f"{dataset.ref}/{name}")


def _render(
    dataset: Dataset,
    tables: Tables,
    against: Dataset | None,
    index: RolloutIndex,
    views: list[RolloutView],
    metrics: list[dict[str, Any]],
) -> str:
    """The page as HTML. metrics: a train run's steps in order, [] for other datasets."""
    labels = annotator_labels(dataset, against) if against is not None else None
    rollouts = [rollout_data(view) for view in views]
    data = page_data(index, labels) | {
        "rows": index.entries(range(len(index))),
        # Rollouts of a group share their problem, so the page holds it once.
        "problems": {rollout["problem_id"]: rollout.pop("problem") for rollout in rollouts},
        "rollouts": rollouts,
        "steps": [row["step"] for row in metrics],
        "phases": [row.get("phase", "") for row in metrics],
        "charts": charts(metrics),
    }
    return render_page(
        data,
        served=False,
        dataset=dataset,
        against=against,
        labels=labels,
        lineage=[lineage_entry(entry) for entry in lineage_chain(dataset, tables.lead, against)],
        # `trace-opd compare` has the figures of two annotators.
        overview=overview(tables) if against is None else None,
        shown=len(views),
        rollouts=tables.lead.rows,
        routed="routed" in tables.by_role,
        paints=paint_names({piece.paint for view in views for piece in view.pieces}),
        inexact=sum(not view.exact for view in views),
    )
