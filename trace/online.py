"""One online step's data: sample, verify, annotate, route, from the current weights."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from ..schemas.configs import RoutingConfig
from .align import ByteTable
from .convert import routed_table
from .protocols import Annotator, Verifier


@dataclass(frozen=True)
class OnlineSource:
    """What the trainer needs to make its own tables.

    problems: (step) -> the problems of that step. sample: (problems, step) -> rollouts by the
    current weights. write: (step, tables) keeps the step's tables, by table name.
    """

    problems: Callable[[int], pa.Table]
    sample: Callable[[pa.Table, int], pa.Table]
    verifier: Verifier
    annotator: Annotator
    bytes: ByteTable
    routing: RoutingConfig
    write: Callable[[int, dict[str, pa.Table]], None]

    def collect(self, step: int, annotate: bool, phase: Callable[[str], None]) -> pa.Table:
        """The routed table of one step; without `annotate` (λ is 0) it is plain GRPO's.

        phase: called with the name of each phase as it begins, for the step's timings.
        """
        phase("sample")
        problems = self.problems(step)
        rollouts = self.sample(problems, step)
        phase("verify")
        tables = {"rollouts": rollouts, "verdicts": self.verifier.verify(problems, rollouts)}
        if annotate:
            phase("annotate")
            tables["annotations"] = self.annotator.annotate(problems, rollouts, tables["verdicts"])
        phase("route")
        tables["routed"] = routed_table(
            problems,
            rollouts,
            tables["verdicts"],
            tables.get("annotations"),
            self.bytes,
            self.routing,
        )
        self.write(step, {"problems": problems} | tables)
        return tables["routed"]
