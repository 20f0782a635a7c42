"""The pool of a train run's online steps: what each band offered, and what was drawn of it.

report_page.py shows it. Stage train keeps the bands' sizes in the run's summary.
"""

import logging
from dataclasses import dataclass
from typing import Any

from ...data.store import Dataset
from .rollout_tables import Tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Band:
    """first, last: online steps of the band, None if the run had none. low, high: ends of the band.

    problems: in the band; drawn: distinct ones of them; right, judged: their responses.
    """

    first: int | None
    last: int | None
    low: float
    high: float
    problems: int
    drawn: int
    responses: int
    right: int
    judged: int

    @property
    def pass_rate(self) -> float | None:
        return self.right / self.judged if self.judged else None


@dataclass(frozen=True)
class PoolView:
    """measure: what the bands are of: a dataset of pass rates, or the problems' levels."""

    measure: str
    bands: list[Band]


def pool_view(run: Dataset, tables: Tables) -> PoolView | None:
    """None for a run without a pool, and for one whose figures can't be read, which is logged."""
    if run.stage != "train" or not run.summary.get("pool"):
        return None
    try:
        rates = run.manifest["inputs"].get("pool_rates")
        measure = "level of the problems" if rates is None else f"pass rate in {rates}"
        return PoolView(measure, _bands(run, tables))
    except (LookupError, TypeError, ValueError, AttributeError):
        logger.warning("%s: its pool's figures can't be read, so they are not shown", run.ref)
        return None


def _bands(run: Dataset, tables: Tables) -> list[Band]:
    config: dict[str, Any] = run.manifest["config"]
    first, count = int(config["offline"]["steps"]), int(config["online"]["steps"])
    begins = [int(one["from_step"]) for one in run.summary["pool"]]
    ends = [*begins[1:], first + count]
    verdicts = tables.by_role["verdicts"]
    out = []
    for one, begin, end in zip(run.summary["pool"], begins, ends, strict=True):
        steps = range(max(begin, first), min(end, first + count))
        drawn: set[str] = set()
        correct: list[bool | None] = []
        for step in steps:  # the table has a part per step
            rows = verdicts.read_part(step - first, ["problem_id", "correct"])
            drawn.update(map(str, rows["problem_id"].to_pylist()))
            correct += rows["correct"].to_pylist()
        low, high = one["band"]
        out.append(
            Band(
                first=steps[0] if steps else None,
                last=steps[-1] if steps else None,
                low=float(low),
                high=float(high),
                problems=int(one["problems"]),
                drawn=len(drawn),
                responses=len(correct),
                right=correct.count(True),
                judged=len(correct) - correct.count(None),
            )
        )
    return out
