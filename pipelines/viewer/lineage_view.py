"""The lineage of a dataset and its rollouts, as the head of report_page.py's page shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...data.store import Dataset
from ..terminal import visible
from .rollout_tables import Tables

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
    "score": {
        "teacher.engine": "engine",
        "teacher.policy.path": "teacher",
        "teacher.model": "teacher",
        "k": "k",
    },
    "train": {"offline.steps": "offline steps", "online.steps": "online steps", "optim.lr": "lr"},
    "evaluate": {"k": "samples", "sampling.temperature": "temperature"},
}


@dataclass(frozen=True)
class Strand:
    """One row of the lineage. label: empty where there is a single row. note: what it is, or why it
    is empty."""

    label: str
    note: str
    entries: list[dict[str, Any]]


def lineage_strands(
    dataset: Dataset, tables: Tables, against: Dataset | None, evaluations: list[Dataset]
) -> list[Strand]:
    """The rows of the lineage. Those of a train run: the tables of the offline steps, those of the
    online steps, then the run and its evaluations."""
    if dataset.stage != "train":
        note = "" if against is not None else "Training and evaluation are on a train run's report."
        chain = lineage_chain(dataset, tables.lead, against)
        return [Strand("", note, [lineage_entry(entry) for entry in chain])]
    made_from = {entry.ref: entry for _, _, entry in dataset.lineage()}
    routed = made_from.get(dataset.manifest["inputs"].get("routed", ""))
    offline = lineage_chain(routed) if routed is not None else []
    online = [
        table
        for table in reversed(tables.by_role.values())
        if table.manifest["config"].get("online") == dataset.ref
    ]
    known = {entry.ref for entry in (*offline, *online)}
    others = [e for e in lineage_chain(dataset, *evaluations) if e.ref not in known]
    # What the run is made from, the run, its evaluations.
    others.sort(key=lambda e: (e.ref not in made_from, e.ref == dataset.ref))
    offline_steps, online_steps = (
        _pick(dataset.manifest["config"], f"{phase}.steps") or 0 for phase in ("offline", "online")
    )
    skipped = "none: {}.steps is 0"
    return [
        Strand(
            "offline",
            f"{offline_steps:,} steps on one table" if offline else skipped.format("offline"),
            [lineage_entry(entry) for entry in offline],
        ),
        Strand(
            "online",
            f"{online_steps:,} steps, a part each" if online else skipped.format("online"),
            [lineage_entry(entry) for entry in online],
        ),
        Strand(
            "trained",
            "before and after" if evaluations else "not evaluated yet",
            [lineage_entry(entry) for entry in others],
        ),
    ]


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
    # Such a table has the time of its run.
    made_in_training = dataset.parts and "online" in manifest["config"]
    return {
        "ref": dataset.ref,
        "stage": dataset.stage,
        "id": dataset.id,
        "rows": dataset.rows if dataset.parts else None,
        "seconds": None if made_in_training else manifest["seconds"],
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
