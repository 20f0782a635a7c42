"""The online source: makes each step's routed table from the current weights.

The trainer calls `OnlineSource.collect` at every online step (`trainer.Online`);
pipelines/training/online_tables.py builds it from the engines and keeps its tables in the store.
One class serves one rank and many, samplers with weights of their own, and steps that are made
ahead.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from .align import ByteTable
from .clock import Phase, PhaseClock
from .protocols import Annotator, Verifier
from .ranks import Ranks
from .route import needs_annotations
from .routed import groups_without_signal, routed_table

Made = tuple[pa.Table, dict[str, float]]  # a step's routed table, and counts for its metrics

_POLL_S = 0.5  # between checks for a stop while a step that is made ahead is not ready


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


@dataclass(eq=False)
class OnlineSource:
    """Makes the tables of online steps; every rank has one.

    problems: (step, round) -> the problems of that step (round 0) and those that may replace them;
        no problem appears twice in a step.
    sample: (problems, step) -> rollouts by the current weights, a group per problem.
    annotator: None where the routing needs no annotation, and on ranks other than the first.
    write: (step, tables) keeps the step's tables, by table name.
    refill_rounds: how often groups without signal are replaced.
    follow: gives the sampler the current weights, and names the phases of that; every rank calls
        it at each step. None: the sampler uses the weights that are trained.
    rest: called after each step that is not made ahead; the sampler is idle until `follow`.
    ranks: the first rank does everything but sampling.
    share: whether all ranks sample, each its slice of the problems; otherwise only the first does.
    ahead: steps to make, on the first rank, while the step before trains, and whether each has a
        teacher.
    """

    problems: Callable[[int, int], pa.Table]
    sample: Callable[[pa.Table, int], pa.Table]
    verifier: Verifier
    annotator: Annotator | None
    bytes: ByteTable
    routing: RoutingConfig
    write: Callable[[int, dict[str, pa.Table]], None]
    refill_rounds: int = 0
    follow: Callable[[Phase], None] | None = None
    rest: Callable[[Phase], None] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    share: bool = True
    ahead: Mapping[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where steps are made ahead this thread alone uses the engines, but for the first step.
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._coming: dict[int, Future[Made]] = {}
        self._closing = False

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> Made:
        """The routed table of one step and counts for its metrics, the same on every rank.

        Without a teacher (λ is 0) nothing is annotated and the table is plain GRPO's.

        A step that is made ahead is one step off-policy, never more: the weights pass to the
        sampler when it is idle, between the end of that step's sampling and the start of the next
        one's. The first step of a run, and of a resumed one, is on-policy. The counts of a step
        made ahead hold the seconds of its phases, which ran during training; waiting for it is a
        phase of the trainer's step.
        """
        coming = self._coming.pop(step, None)
        made = None if coming is None else _wait(coming, phase)
        if self.follow is not None:
            self.follow(phase)
        if not self.ranks.first:
            made = self._assist()
        elif made is None:
            made = self._make(step, with_teacher, phase)
        if self.ranks.first and step + 1 in self.ahead:
            self._coming[step + 1] = self._thread.submit(self._make_ahead, step + 1)
        elif self.rest is not None:
            self.rest(phase)
        if self.ranks.first:
            self.ranks.broadcast((None, made))
        return made

    def close(self) -> None:
        """Stop a step that is being made ahead at its next phase, and wait for that."""
        self._closing = True
        self._thread.shutdown(wait=True)

    def _make(self, step: int, with_teacher: bool, phase: Phase) -> Made:
        """All rollouts are written: first those that the step trains on, then those of replaced
        groups. Only the former have rows in the annotations and in the routed table.
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

    def _make_ahead(self, step: int) -> Made:
        """`_make` in the thread, with the seconds of its phases among the counts."""
        clock = PhaseClock(lambda: self._closing)
        table, counts = self._make(step, self.ahead[step], clock)
        seconds = clock.metrics()
        del seconds["seconds"]  # the trainer's step has its own
        return table, counts | seconds

    def _dynamic_sample(self, step: int, phase: Phase) -> tuple[pa.Table, Judged, Judged]:
        """Problems sampled, groups to train on, and groups replaced.

        Dynamic sampling (DAPO, arXiv 2503.14476): other problems replace groups without signal.
        Such a group stays if no problem is left.
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

    def _judge(self, problems: pa.Table, step: int, phase: Phase) -> Judged:
        phase("sample")
        if self.share and self.ranks.count > 1:
            self.ranks.broadcast((problems, step))
            rollouts = self._sample_shares(problems, step)
        else:
            rollouts = self.sample(problems, step)
        phase("verify")
        return Judged(rollouts, self.verifier.verify(problems, rollouts))

    def _assist(self) -> Made:
        """On the other ranks: sample whenever the first rank does, until it sends the step."""
        while True:
            problems, sent = self.ranks.broadcast(None)
            if problems is None:
                return sent
            self._sample_shares(problems, sent)

    def _sample_shares(self, problems: pa.Table, step: int) -> pa.Table:
        return sample_shares(self.ranks, problems, lambda own: self.sample(own, step))


def sample_shares(
    ranks: Ranks, problems: pa.Table, sample: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    """Sample this rank's slice of the problems; the rollouts of all slices, on every rank."""
    begin, end = (len(problems) * edge // ranks.count for edge in (ranks.index, ranks.index + 1))
    rollouts = sample(problems.slice(begin, end - begin)) if end > begin else None
    return pa.concat_tables(part for part in ranks.gather(rollouts) if part is not None)


def _wait(coming: Future[Made], phase: Phase) -> Made:
    phase("wait")
    while not wait([coming], timeout=_POLL_S).done:
        phase("wait")  # raises Stopped if the run has to stop
    return coming.result()
