"""Stage report: one self-contained HTML file with a dataset's rollouts, token by token, or with two
annotators of the same rollouts side by side.

stages/report.py makes a stage of `run`. `trace-opd view` shows datasets of any size.
"""

from pathlib import Path

from ...data.atomic import sweep_siblings, write_atomic
from ...data.store import MANIFEST, Dataset, Store
from ...schemas.configs import ReportConfig
from ...schemas.tables import SCORES, VERDICTS
from .evaluation_view import evaluation_views, find_evaluations
from .lineage_view import lineage_strands
from .overview import overview
from .page import page_data, paint_names, render_page
from .pool_view import pool_view
from .rollout_index import RolloutIndex, build_index
from .rollout_tables import (
    Tables,
    annotator_labels,
    choose_groups,
    find_counterpart,
    find_tables,
    find_vocabulary,
)
from .rollout_view import RolloutReader, RolloutView, rollout_data
from .training_curves import charts, metrics_of, types_by_step

_MOST_EVALUATIONS = 3


def run(config: ReportConfig, store: Store, output: Path | None = None) -> Path:
    """Write the report of a dataset of rollouts or of a train run (`find_tables`); its path.

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
    views = RolloutReader(tables, find_vocabulary(dataset, tables), against).read(index.rows)
    html = _render(dataset, tables, against, index, views, store)
    write_atomic(output, html.encode())
    sweep_siblings(output)
    return output


def _left_out(
    dataset: Dataset, tables: Tables, evaluations: list[Dataset]
) -> list[tuple[str, str]]:
    """What belongs to a dataset and is not on its page: sentences and the commands that show it."""
    lead, out = tables.lead, []
    if (missing := tables.by_role["rollouts"].rows - lead.rows) > 0:
        out.append(
            (
                f"{missing:,} sampled rollouts that table {lead.ref} leaves out: without a score, "
                "not selected, or of a group that was replaced.",
                f"trace-opd view {tables.by_role['annotations'].ref}"
                if "annotations" in tables.by_role
                else "",
            )
        )
    routed = dataset.manifest["inputs"].get("routed") if dataset.stage == "train" else None
    if routed is not None and routed != lead.ref:
        out.append(("The rollouts of the offline steps.", f"trace-opd report dataset={routed}"))
    if dataset.stage == "train":
        for entry in evaluations[_MOST_EVALUATIONS:]:
            out.append(("An older evaluation.", f"trace-opd show {entry.ref}"))
        if evaluations:
            out.append(("Responses to the held-out problems: an evaluation keeps counts.", ""))
        else:
            out.append(
                (
                    "Figures on held-out problems: the store had no evaluation of this run when "
                    "the page was written.",
                    f"trace-opd evaluate problems=HELD-OUT trained={dataset.ref}",
                )
            )
    return out


def _scores(dataset: Dataset, store: Store) -> Dataset | None:
    """The teacher's scores of a page: the dataset itself, or those that it was made with."""
    if dataset.contract is SCORES:
        return dataset
    ref = dataset.manifest["inputs"].get("scores")
    return store.get(ref) if ref is not None and store.files.exists(f"{ref}/{MANIFEST}") else None


def _default_output(dataset: Dataset, against: Dataset | None, store: Store) -> Path:
    name = f"against-{against.id}.html" if against is not None else "report.html"
    return store.files.local_path(f"{dataset.ref}/{name}")


def _render(
    dataset: Dataset,
    tables: Tables,
    against: Dataset | None,
    index: RolloutIndex,
    views: list[RolloutView],
    store: Store,
) -> str:
    """The page as HTML."""
    metrics = metrics_of(dataset, store)
    evaluations = find_evaluations(dataset, store) if dataset.stage == "train" else []
    labels = annotator_labels(dataset, against) if against is not None else None
    rollouts = [rollout_data(view) for view in views]
    data = page_data(index, labels, tables.lead.rows) | {
        "rows": index.entries(range(len(index))),
        # Rollouts of a group share their problem, so the page holds it once.
        "problems": {rollout["problem_id"]: rollout.pop("problem") for rollout in rollouts},
        "rollouts": rollouts,
        "steps": [row["step"] for row in metrics],
        "phases": [row.get("phase", "") for row in metrics],
        "charts": charts(metrics, types_by_step(dataset)),
    }
    return render_page(
        data,
        served=False,
        dataset=dataset,
        against=against,
        labels=labels,
        lineage=lineage_strands(dataset, tables, against, evaluations),
        evaluations=evaluation_views(evaluations[:_MOST_EVALUATIONS]),
        left_out=_left_out(dataset, tables, evaluations),
        # `trace-opd compare` has the figures of two annotators.
        overview=overview(tables, _scores(dataset, store)) if against is None else None,
        pool=pool_view(dataset, tables),
        shown=len(views),
        rollouts=tables.lead.rows,
        routed="routed" in tables.by_role,
        annotated=tables.lead.contract is not VERDICTS,
        paints=paint_names({piece.paint for view in views for piece in view.pieces}),
        inexact=sum(not view.exact for view in views),
    )
