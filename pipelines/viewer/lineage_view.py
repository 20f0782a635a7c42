"""The lineage of a dataset and its rollouts, as the head of report_page.py's page shows it."""

from pathlib import Path
from typing import Any

import yaml

from ...data.store import Dataset
from ..terminal import visible

# Stage: the config fields that the lineage shows without unfolding, with their labels.
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


def lineage_chain(*datasets: Dataset | None) -> list[Dataset]:
    """The datasets and all their inputs, direct and indirect, each once, sources first."""
    chain = [entry for dataset in datasets if dataset is not None for entry in dataset.lineage()]
    unique = {entry.ref: entry for _, _, entry in sorted(chain, key=lambda item: -item[0])}
    return list(unique.values())


def lineage_entry(dataset: Dataset) -> dict[str, Any]:
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
    """The last name of a path; any other value unchanged."""
    return Path(value).name if isinstance(value, str) else value


def _yaml(value: Any) -> str:
    if not value:
        return ""
    return visible(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip())
