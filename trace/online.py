"""One online step's data: sample, verify, annotate, route, from the current weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from .advantage import groups_without_signal
from .align import ByteTable
from .convert import routed_table
from .protocols import Annotator, Verifier
from .rules import needs_annotations


@dataclass(frozen=True)
class Judged:
    """Rollouts and their verdicts, row for row."""

    rollouts: pa.Table
    verdicts: pa.Table

    def split(self, groups: Sequence[str]) -> tuple["Judged", "Judged"]:
        """Those outside the groups, and those inside."""
        inside = pc.is_in(self.rollouts["group_id"], pa.array(groups, pa.string()))
        return self._where(pc.invert(inside)), self._where(inside)

    def __add__(self, other: "Judged") -> "Judged":
        return Judged(
            pa.concat_tables([self.rollouts, other.rollouts]),
            pa.concat_tables([self.verdicts, other.verdicts]),
        )

    def _where(self, mask: Any) -> "Judged":
        return Judged(self.rollouts.filter(mask), self.verdicts.filter(mask))


@dataclass(frozen=True)
class OnlineSource:
    """What the trainer needs to make its own tables.

    problems: (step, round) -> the problems of that step (round 0) and those that may replace them;
    no problem comes twice in a step. sample: (problems, step) -> rollouts by the current weights,
    a group per problem. annotator: may be None where the routing looks at no annotation. write:
    (step, tables) keeps the step's tables, by table name.
    refill_rounds: times that groups without signal are replaced.
    """

    problems: Callable[[int, int], pa.Table]
    sample: Callable[[pa.Table, int], pa.Table]
    verifier: Verifier
    annotator: Annotator | None
    bytes: ByteTable
    routing: RoutingConfig
    write: Callable[[int, dict[str, pa.Table]], None]
    refill_rounds: int = 0

    def spread(self, sample: Callable[[pa.Table, int], pa.Table]) -> "OnlineSource":
        """The same source with another way to sample."""
        return replace(self, sample=sample)

    def collect(
        self, step: int, with_teacher: bool, phase: Callable[[str], None]
    ) -> tuple[pa.Table, dict[str, float]]:
        """The routed table of one step, and counts for its metrics.

        Without a teacher (λ is 0) nothing is annotated and the table is plain GRPO's. All that was
        sampled is written: first the rollouts that the step trains on, then those of groups that
        were replaced; only the former have rows in the annotations and in the routed table.
        phase: called with the name of each phase as it begins, for the step's timings.
        """
        problems, judged, replaced = self._dynamic_sample(step, phase)
        annotations = None
        if with_teacher and needs_annotations(self.routing):
            assert self.annotator is not None, "this routing needs an annotator"
            phase("annotate")
            annotations = self.annotator.annotate(problems, judged.rollouts, judged.verdicts)
        phase("route")
        routed = routed_table(
            problems,
            judged.rollouts,
            judged.verdicts,
            annotations,
            self.bytes,
            self.routing,
            with_teacher,
        )
        sampled = judged + replaced
        tables = {
            "problems": problems,
            "rollouts": sampled.rollouts,
            "verdicts": sampled.verdicts,
            "routed": routed,
        }
        self.write(step, tables if annotations is None else tables | {"annotations": annotations})
        return routed, {
            "groups_replaced": pc.count_distinct(replaced.rollouts["group_id"]).as_py(),
            "staleness": step - pc.min(judged.rollouts["policy_step"]).as_py(),
        }

    def _dynamic_sample(
        self, step: int, phase: Callable[[str], None]
    ) -> tuple[pa.Table, Judged, Judged]:
        """Problems asked, groups to train on, and those that they replaced (dynamic sampling, DAPO,
        arXiv 2503.14476). A group without signal stays if no problem is left to replace it.
        """
        problems = self.problems(step, 0)
        judged, replaced = self._judge(problems, step, phase).split([])
        for refill in range(1, self.refill_rounds + 1):
            silent = groups_without_signal(judged.rollouts, judged.verdicts, self.routing)
            fresh = self.problems(step, refill).slice(0, len(silent))
            if not len(fresh):
                break
            judged, dropped = judged.split(silent[: len(fresh)])
            judged += self._judge(fresh, step, phase)
            replaced += dropped
            problems = pa.concat_tables([problems, fresh])
        return problems, judged, replaced

    def _judge(self, problems: pa.Table, step: int, phase: Callable[[str], None]) -> Judged:
        phase("sample")
        rollouts = self.sample(problems, step)
        phase("verify")
        return Judged(rollouts, self.verifier.verify(problems, rollouts))
