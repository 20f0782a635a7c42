"""Stage report: one self-contained HTML file that shows a dataset's rollouts, token by token.

The page holds its data, style and script; it loads nothing and, by its content security policy,
can load nothing and run no script but its own, whatever a response contains.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..data.store import Dataset, Store
from ..schemas.configs import ReportConfig
from .overview import overview
from .paint import Paint, visible
from .rollout_tables import Tables, choose_groups, find_byte_table, find_tables
from .rollout_view import RolloutView, load_rollouts

_HERE = Path(__file__).parent
_SCRIPTS = ("report.js", "report_curves.js")
# Title, unit, names of the metrics in metrics.jsonl. Metrics named nowhere get a chart each.
_CHARTS = (
    ("Reward", "share", "reward|pass_rate"),
    ("Entropy", "nats / token", "entropy"),
    ("Response length", "tokens", "response_tokens"),
    ("KL weight λ", "", "kl_weight"),
    ("KL on routed tokens", "nats / token", "kl_(fkl|rkl|jsd)"),
    ("Routed tokens", "share", "coverage(_.+)?"),
    ("Exposure Σλ²", "", "kl_exposure"),
    ("Truncated, no signal", "share", "truncated|groups_without_signal"),
    ("Clipped", "share of tokens", "ratio_clipped|kl_clipped"),
    # The largest drift of a step's tokens would flatten their mean.
    ("Sampler drift", "nats / token", "sampler_drift|sampler_kl"),
    ("Largest sampler drift", "nats", "sampler_drift_max"),
    ("KL to the base policy", "nats / token", "kl_reference"),
    ("Gradient norm", "", "grad_norm"),
    ("Steps skipped", "so far", "steps_skipped"),
    ("Throughput", "tokens / s", "tokens_per_s(econd)?"),
    ("Time per step", "s", "seconds.*"),
)
# Stage: path into its config and label of what the lineage shows without unfolding.
_FACTS = {
    "rollout": {"policy.path": "policy", "group_size": "G", "sampling.temperature": "temperature"},
    "annotate": {
        "annotator.engine": "engine",
        "annotator.name": "by",
        "annotator.model": "model",
    },
    "convert": {
        "routing.rule": "rule",
        "routing.alpha": "α",
        "routing.key": "key →",
        "routing.error": "error →",
    },
    "train": {"offline.steps": "offline steps", "online.steps": "online steps", "optim.lr": "lr"},
}


def run(config: ReportConfig, store: Store) -> Path:
    """Write the report of a routed or annotations dataset or of a train run; returns its path.

    Raises:
        InputError: the dataset is of another kind, or the store is not local and no output is set.
    """
    dataset = store.get(config.dataset)
    tables = find_tables(dataset, store)
    output = Path(config.output) if config.output else _default_output(dataset, store)
    ids = choose_groups(tables.lead, config.limit)
    views = load_rollouts(tables, ids, find_byte_table(dataset, tables))
    html = render(dataset, tables, views, read_metrics(dataset, store))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")
    return output


def _default_output(dataset: Dataset, store: Store) -> Path:
    return store.local_root() / dataset.ref / "report.html"


def render(
    dataset: Dataset, tables: Tables, views: list[RolloutView], metrics: list[dict[str, Any]]
) -> str:
    """The page as HTML. metrics: a train run's steps in order, else []."""
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        dataset=dataset,
        lineage=[_lineage_entry(d) for d in _lineage(dataset, tables)],
        overview=overview(tables),
        data=page_data(views, metrics),
        shown=len(views),
        has_curves=bool(metrics),
        routed="routed" in tables.by_role,
        paints=_names({piece.paint for view in views for piece in view.pieces}),
        inexact=sum(not view.exact for view in views),
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
    )


def page_data(views: list[RolloutView], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script draws, as JSON-able data; problems stand once."""
    problems: dict[str, dict[str, str]] = {}
    rollouts = []
    for view in views:
        row: dict[str, Any] = vars(view) | {"spans": [vars(span) for span in view.spans]}
        problem = {name: row.pop(name) for name in ("problem", "answer", "source")}
        problems.setdefault(view.problem_id, problem)
        rollouts.append(row)
    return {
        "problems": problems,
        "rollouts": rollouts,
        "paints": _names(Paint),
        "steps": [row["step"] for row in metrics],
        "phases": [row.get("phase", "") for row in metrics],
        "charts": charts(metrics),
    }


def _names(paints: Iterable[Paint]) -> list[str]:
    return [paint.name.lower() for paint in sorted(paints)]


# --- training curves -----------------------------------------------------------------------------


def read_metrics(dataset: Dataset, store: Store) -> list[dict[str, Any]]:
    """A train run's metrics per step; [] for other datasets. What is not finite becomes None."""
    path = f"{dataset.ref}/metrics.jsonl"
    if dataset.stage != "train" or not store.exists(path):
        return []
    with store.open(path) as file:
        rows = [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def charts(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Titles, units and series of the training curves; a step without a value holds None."""
    names = [
        name
        for name in dict.fromkeys(name for row in metrics for name in row)
        if name != "step" and any(isinstance(row.get(name), int | float) for row in metrics)
    ]
    left = dict.fromkeys(names)
    out = []
    for title, unit, pattern in _CHARTS:
        members = [name for name in left if re.fullmatch(pattern, name)]
        for name in members:
            del left[name]
        if members:
            out.append(_chart(title, unit, members, metrics))
    return out + [_chart(name, "", [name], metrics) for name in left]


def _chart(title: str, unit: str, names: list[str], metrics: list[dict]) -> dict[str, Any]:
    series = [{"name": name, "values": [row.get(name) for row in metrics]} for name in names]
    return {"title": title, "unit": unit, "series": series}


# --- lineage -------------------------------------------------------------------------------------


def _lineage(dataset: Dataset, tables: Tables) -> list[Dataset]:
    """Everything that the dataset and its rollouts were made from, each once, sources first."""
    store = dataset.store
    chain = [*store.lineage(dataset), *store.lineage(tables.lead)]
    unique = {entry.ref: entry for _, _, entry in sorted(chain, key=lambda item: -item[0])}
    return list(unique.values())


def _lineage_entry(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    facts = [
        (label, _pick(manifest["config"], path))
        for path, label in _FACTS.get(dataset.stage, {}).items()
    ]
    return {
        "ref": dataset.ref,
        "stage": dataset.stage,
        "id": dataset.id,
        "rows": dataset.rows if dataset.parts else None,
        "seconds": manifest["seconds"],
        "finished_at": manifest["finished_at"],
        "facts": [(label, _short(value)) for label, value in facts if value is not None],
        "packages": manifest["packages"],
        "summary": _yaml(manifest["summary"]),
        "config": _yaml(manifest["config"]),
    }


def _pick(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _short(value: Any) -> Any:
    """A policy's folder by its last name; everything else as it is."""
    return Path(value).name if isinstance(value, str) else value


def _yaml(value: Any) -> str:
    if not value:
        return ""
    return visible(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip())


def csp_hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
