"""The evaluations of a train run before and after, as report_page.py's page shows them."""

import logging
from dataclasses import dataclass
from typing import Any

from ...data.store import Dataset, Store
from ..terminal import visible

logger = logging.getLogger(__name__)

_ROLES = ("base", "trained")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One figure of both policies; difference: paired by problem."""

    name: str
    before: Estimate
    after: Estimate
    difference: Estimate

    @property
    def direction(self) -> str:
        """good or bad where the interval of the difference excludes zero."""
        return "good" if self.difference.low > 0 else "bad" if self.difference.high < 0 else ""


@dataclass(frozen=True)
class Evaluation:
    """What the page shows of an evaluate dataset."""

    ref: str
    problems: int
    samples: int
    sources: list[str]
    figures: list[Figure]


def find_evaluations(run: Dataset, store: Store) -> list[Dataset]:
    """The evaluations of a run, the newest first."""
    found = [
        dataset
        for dataset in store.datasets("evaluate")
        if dataset.manifest["inputs"].get("trained") == run.ref
    ]
    return sorted(found, key=lambda dataset: dataset.manifest["finished_at"], reverse=True)


def evaluation_views(datasets: list[Dataset]) -> list[Evaluation]:
    """Of evaluations whose summaries can be read; others are logged and skipped."""
    views = []
    for dataset in datasets:
        try:
            views.append(_view(dataset))
        except (LookupError, TypeError, ValueError, AttributeError):
            logger.warning(
                "%s: its summary is not an evaluation's, so it is not shown", dataset.ref
            )
    return views


def _view(dataset: Dataset) -> Evaluation:
    policies = dataset.summary["policies"]
    columns = [policies[role] for role in _ROLES] + [dataset.summary["paired_difference"]]
    figures = [
        Figure(visible(name), *(_estimate(column[name]) for column in columns))
        for name in policies["base"]
        if "@" in name
    ]
    base = policies["base"]
    sources = [visible(source) for source in base["sources"]]
    return Evaluation(
        dataset.ref, int(base["problems"]), int(dataset.summary["k"]), sources, figures
    )


def _estimate(found: dict[str, Any]) -> Estimate:
    low, high = found["ci95"]
    return Estimate(float(found["value"]), float(low), float(high))
