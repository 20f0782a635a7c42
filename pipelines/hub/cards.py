"""Cards of datasets and models: README.md of a repository, its metadata as YAML in front.

contents.py calls. The same dataset has the same card, byte for byte, so that a second push changes
nothing.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...data.dataset import find_dataset
from ...data.store import Dataset, Store
from ...data.written_tables import KINDS
from ...schemas.configs import TrainConfig
from ...schemas.contract import description
from ...schemas.errors import InputError
from ...schemas.settings import validated
from ..viewer.evaluation_view import Estimate, Evaluation, evaluation_views, find_evaluations
from .public import figures, hub_id, public, public_text

_SIZES = ("K", "M", "B", "T")
_TAG = "trace-opd"


def dataset_card(dataset: Dataset, repo: str, schema: pa.Schema, license_id: str | None) -> str:
    """The card of a dataset with a table. schema: its columns with their descriptions."""
    table = dataset.manifest["table"]
    data = DatasetCardData(
        license=license_id,
        tags=[_TAG, table],
        size_categories=[size_category(dataset.rows)],
        pretty_name=f"{table.capitalize()} of trace-opd",
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    )
    return _template("dataset_card.md.j2").render(
        metadata=data.to_yaml(),
        dataset=dataset,
        table=table,
        repo=repo,
        bytes=sum(part["bytes"] for part in dataset.manifest["parts"]),
        columns=[(f.name, _shown_type(f.type), description(f)) for f in schema],
        steps=_steps(dataset),
        shown=None,
        figures=_yaml(figures(dataset.summary)),
        paid=_paid(dataset),
        import_of=KINDS[table].role if table in KINDS else None,
    )


def model_card(run: Dataset, store: Store, repo: str, license_id: str | None) -> str:
    """The card of a training's model, with the evaluations of the run that the store holds."""
    config = run.manifest["config"]
    base = config["policy"]["path"]
    evaluations = evaluation_views(find_evaluations(run, store))
    name = repo.rpartition("/")[2]
    data = ModelCardData(
        license=license_id,
        base_model=hub_id(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[_TAG],
        model_name=name if evaluations else None,
        eval_results=[found for one in evaluations for found in _results(one)] or None,
    )
    return _template("model_card.md.j2").render(
        metadata=data.to_yaml(),
        run=run,
        repo=repo,
        name=name,
        base=hub_id(base) or public_text(base),
        method=_method(config),
        evaluations=evaluations,
        steps=_steps(run),
        shown=run.ref,
        config=_yaml(public(config)),
        figures=_yaml(figures({k: v for k, v in run.summary.items() if k != "tables"})),
        tables=run.summary.get("tables", {}),
        paid=_paid(run),
    )


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows: n<1K, 1K<n<10K, …"""
    if rows < 1000:
        return "n<1K"
    bounds = [f"{number}{unit}" for unit in _SIZES for number in (1, 10, 100)]
    power = min(len(str(rows)) - 4, len(bounds) - 2)
    return f"{bounds[power]}<n<{bounds[power + 1]}"


def _results(evaluation: Evaluation) -> list[EvalResult]:
    """The model's own figures of an evaluation, for the Hub's model index."""
    sources = ", ".join(evaluation.sources)
    kind = hub_id(evaluation.sources[0]) if len(evaluation.sources) == 1 else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind or sources,
            dataset_name=sources,
            metric_type=figure.name,
            metric_value=round(figure.after.value, 4),
            metric_name=f"{figure.name}, 95 % interval {_interval(figure.after)}",
        )
        for figure in evaluation.figures
        if figure.after is not None
    ]


def _steps(dataset: Dataset) -> list[dict[str, Any]]:
    """Everything that the dataset was made from and itself, in the order in which it was made."""
    nodes = {node.ref: node for _, _, node in dataset.lineage()}
    order: list[Dataset] = []

    def visit(ref: str) -> None:
        node = nodes.pop(ref, None)
        if node is None:
            return
        for one in node.manifest["inputs"].values():
            visit(one)
        order.append(node)

    visit(dataset.ref)
    return [
        {
            "ref": node.ref,
            "stage": node.stage,
            "rows": node.rows,
            "inputs": node.manifest["inputs"],
            "release": node.manifest["packages"].get("trace-opd", "unknown"),
            "config": _yaml(public(node.manifest["config"])),
        }
        for node in order
    ]


def _paid(dataset: Dataset) -> list[dict[str, Any]]:
    """Who annotated or judged, with tokens and cost, of every table that a model answered for.

    Those of a training's online steps are listed in its summary.
    """
    config = dataset.manifest["config"]
    made = [(node, node.manifest["config"].get("annotator")) for _, _, node in dataset.lineage()]
    for ref in dataset.summary.get("tables", {}).values():
        node = find_dataset(dataset.files, ref)
        made += [] if node is None else [(node, config["online"]["annotator"])]
    return [
        {
            "ref": node.ref,
            "by": (by or {}).get("model") or (by or {}).get("name") or (by or {}).get("engine"),
            "tokens": [node.summary.get(f"{name}_tokens") for name in ("prompt", "completion")],
            "cost": node.summary["cost_usd"],
        }
        for node, by in made
        if "cost_usd" in node.summary
    ]


def _method(config: dict[str, Any]) -> str:
    """The preset of a training; of a config that this release can't read, nothing more precise."""
    from ..training.collapse import method_name  # imports torch, which no dataset's card needs

    try:
        return method_name(validated(TrainConfig, deepcopy(config), []))
    except InputError:
        return "settings of an older release"


def _shown_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_shown_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(f"{f.name}: {_shown_type(f.type)}" for f in kind) + "}"
    return str(kind)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} … {estimate.high:.3f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.3f} ({_interval(estimate)})"


def _cell(text: object) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701  Markdown of a contract, figures and configs
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"cell": _cell, "interval": _with_interval}
    return environment.get_template(name)
