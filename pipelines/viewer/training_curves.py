"""Training curves of a run: which metrics share a chart.

report_page.py calls it for a train run; web/curves.js draws the charts. `trace-opd plot` takes
titles and units from it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ...data.dataset import find_dataset
from ...data.store import Dataset, Store
from ...schemas.labels import Route
from ..run_metrics import METRICS, parse_metrics

_ROUTES = "|".join(route.name.lower() for route in Route)
# Title, unit, pattern of the names in metrics.jsonl. Every other metric gets a chart of its own.
_CHARTS = (
    ("Reward", "share", "reward|pass_rate(_se)?"),
    ("Entropy", "nats / token", "entropy"),
    ("Response length", "tokens", "response_tokens"),
    ("KL weight λ", "", "kl_weight"),
    ("KL on routed tokens", "nats / token", f"kl_({_ROUTES})"),
    ("Routed tokens", "share", "coverage(_.+)?"),
    ("Exposure Σλ²", "", "kl_exposure"),
    ("Truncated, looping, no signal", "share", "truncated|looping|groups_without_signal"),
    ("Clipped", "share of tokens", "ratio_clipped|kl_clipped"),
    # A chart of its own: the largest drift of a step's tokens would flatten their mean.
    ("Sampler drift", "nats / token", "sampler_drift|sampler_kl"),
    ("Largest sampler drift", "nats", "sampler_drift_max"),
    ("KL to the base policy", "nats / token", "kl_reference"),
    ("Gradient norm", "", "grad_norm"),
    ("Steps skipped", "so far", "steps_skipped"),
    ("Throughput", "tokens / s", "tokens_per_s(econd)?"),
    ("Throughput per GPU", "tokens / s", "tokens_per_second_per_gpu"),
    ("GPU utilisation", "share", "mfu|gpu_busy"),
    ("Sampling", "share", "sampling_share|sampling_overlap"),
    ("Peak memory", "GiB", "peak_memory_gib_.+"),
)
# Phases of a step that may be made while the step before it trains; such a step has an overlap.
_AHEAD = tuple(f"seconds_{phase}" for phase in ("sample", "verify", "annotate", "route"))
_OTHER = "other"  # a step's seconds outside its phases


def metrics_of(dataset: Dataset, store: Store) -> list[dict[str, Any]]:
    """A train run's metrics per step; [] for other datasets. NaN and infinities become None."""
    path = f"{dataset.ref}/{METRICS}"
    if dataset.stage != "train" or not store.files.exists(path):
        return []
    with store.files.open(path) as file:
        steps = parse_metrics(file.read())
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in step.items()
        }
        for step in steps
    ]


def named_metric(name: str) -> tuple[str, str]:
    """Title and unit of a metric's chart; of one without, its name and no unit."""
    found = ((title, unit) for title, unit, pattern in _CHARTS if re.fullmatch(pattern, name))
    return next(found, (name.replace("_", " "), ""))


def types_by_step(run: Dataset) -> dict[int, Counter[str]]:
    """How many responses of each online step have which type, by step; {} without annotations.

    A train run's annotations have a part per online step. Steps without a type are left out.
    """
    ref = run.summary.get("tables", {}).get("annotations") if run.stage == "train" else None
    annotations = None if ref is None else find_dataset(run.files, ref)
    if annotations is None:
        return {}
    first = run.manifest["config"].get("offline", {}).get("steps", 0)
    found = {}
    for part in range(annotations.parts):
        types = annotations.read_part(part, ["diagnostic_type"])["diagnostic_type"]
        if counts := Counter(types.drop_null().to_pylist()):
            found[first + part] = counts
    return found


def charts(
    metrics: list[dict[str, Any]], types: Mapping[int, Counter[str]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Title, unit and series of each chart; None at a step without a value.

    A chart with `stacked` adds its series up. types: see `types_by_step`.
    """
    names = [
        name
        for name in dict.fromkeys(name for row in metrics for name in row)
        if name != "step" and any(isinstance(row.get(name), int | float) for row in metrics)
    ]
    left = dict.fromkeys(name for name in names if not re.fullmatch("seconds(_.+)?", name))
    out = []
    for title, unit, pattern in _CHARTS:
        members = [name for name in left if re.fullmatch(pattern, name)]
        for name in members:
            del left[name]
        if members:
            out.append(_chart(title, unit, members, metrics))
    return (
        out
        + _types(metrics, types)
        + _phases(metrics)
        + [_chart(name, "", [name], metrics) for name in left]
    )


def _types(
    metrics: list[dict[str, Any]], types: Mapping[int, Counter[str]]
) -> list[dict[str, Any]]:
    """Responses of each type, stacked to all that have one; the most frequent type first."""
    names = [name for name, _ in sum(types.values(), Counter[str]()).most_common()]
    rows = [types.get(row.get("step", -1), {}) for row in metrics]
    chart = _chart("Diagnostic types", "responses", names, rows)
    return [chart | {"stacked": True}] if names else []


def _phases(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of each step's phases, those that follow each other stacked to the step's."""
    during, ahead = [], []
    for row in metrics:
        seconds = {name: s for name, s in row.items() if name.startswith("seconds_") and s}
        made = _AHEAD if "sampling_overlap" in row else ()
        ahead.append({name: value for name, value in seconds.items() if name in made})
        during.append({name: value for name, value in seconds.items() if name not in made})
        if row.get("seconds"):
            during[-1][_OTHER] = max(row["seconds"] - sum(during[-1].values()), 0.0)
    charts = (("Time per step", during), ("Made ahead, while the step before trains", ahead))
    return [
        _chart(title, "s", list(dict.fromkeys(n for row in rows for n in row)), rows)
        | {"stacked": True}
        for title, rows in charts
        if any(rows)
    ]


def _chart(
    title: str, unit: str, names: list[str], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    series = [{"name": name, "values": [row.get(name) for row in metrics]} for name in names]
    return {"title": title, "unit": unit, "series": series}
