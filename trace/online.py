"""Online steps: sample, verify, annotate and route from the current weights.

The trainer calls `collect` of one source per step. `OnlineSource` makes a step's tables; the others
wrap a source for a sampler that has weights of its own (`Following`), for one that works one step
ahead in a thread (`Ahead`), and for several ranks (`SharedOnline`). pipelines/training composes them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.errors import Stopped
from .align import ByteTable
from .convert import groups_without_signal, routed_table
from .protocols import Annotator, Verifier
from .ranks import Ranks
from .route import needs_annotations
from .trainer import Online

_POLL_S = 0.5  # between checks whether the run was asked to stop

Phase = Callable[[str], None]
Sample = Callable[[pa.Table, int], pa.Table]
Collected = tuple[Any, dict[str, float]]


@dataclass(frozen=True)
class Judged:
    """Rollouts and their verdicts, row by row."""

    rollouts: pa.Table
    verdicts: pa.Table

    def split(self, groups: Sequence[str]) -> tuple["Judged", "Judged"]:
        """The rows outside these groups, and the rows inside."""
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
    """Makes each step's tables by an engine that samples with the current weights.

    problems: (step, round) -> the step's problems (round 0), or replacements for them; no problem
    appears twice in a step. sample: (problems, step) -> rollouts by the current weights, a group
    per problem. annotator: None if the routing needs no annotations. write: (step, tables) stores
    the step's tables, by table name. refill_rounds: how often groups without signal are replaced.
    """

    problems: Callable[[int, int], pa.Table]
    sample: Sample
    verifier: Verifier
    annotator: Annotator | None
    bytes: ByteTable
    routing: RoutingConfig
    write: Callable[[int, dict[str, pa.Table]], None]
    refill_rounds: int = 0

    def spread(self, sample: Sample) -> "OnlineSource":
        """The same source with another `sample`."""
        return replace(self, sample=sample)

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> Collected:
        """The routed table of one step, and counts for its metrics.

        Without a teacher (λ is 0) nothing is annotated and the table is plain GRPO's. All samples
        are written: first the rollouts that the step trains on, then those of replaced groups,
        which have no rows in the annotations and in the routed table.
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

    def _dynamic_sample(self, step: int, phase: Phase) -> tuple[pa.Table, Judged, Judged]:
        """Problems sampled, groups to train on, and groups replaced.

        Dynamic sampling (DAPO, arXiv 2503.14476): other problems replace groups without signal. Such
        a group stays if no problem is left.
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
        rollouts = self.sample(problems, step)
        phase("verify")
        return Judged(rollouts, self.verifier.verify(problems, rollouts))


@dataclass(frozen=True)
class Following:
    """A source whose sampler gets the current weights before each step.

    follow: hands them over. rest: called once sampling is done; the sampler may free memory until
    the next `follow`.
    """

    source: Online
    follow: Callable[[], None]
    rest: Callable[[], None]

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> Collected:
        """See `OnlineSource.collect`."""
        phase("weights")
        self.follow()
        made = self.source.collect(step, with_teacher, phase)
        self.rest()
        return made


class Ahead:
    """A source that makes the next step's table in a thread while a step trains.

    The sampler gets the weights at the begin of a step, while it is idle, and the next step trains
    on what it samples from then on. So rollouts are exactly one step off-policy, and handing over
    the weights never waits for a busy sampler.

    source: used by that thread alone after the first step. follow: gives its sampler the current
    weights. with_teacher: step -> whether λ > 0. steps: number of steps of the run.
    """

    def __init__(
        self,
        source: Online,
        follow: Callable[[], None],
        with_teacher: Callable[[int], bool],
        steps: int,
    ) -> None:
        self._source, self._follow = source, follow
        self._with_teacher, self._steps = with_teacher, steps
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[int, Future[Collected]] | None = None
        self._closing = False

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> Collected:
        """See `OnlineSource.collect`. A run's first step is on-policy, a resumed run's too.

        The counts hold the seconds of the phases that ran in the thread. Waiting for the thread is
        a phase of the step itself.
        """
        made = None
        if self._next is not None and self._next[0] == step:
            made = self._await(self._next[1], phase)
        phase("weights")
        self._follow()
        if made is None:
            made = self._source.collect(step, with_teacher, phase)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return made

    def close(self) -> None:
        """Stop the thread at its next phase and wait for it."""
        self._closing = True
        self._thread.shutdown(wait=True)

    def _await(self, coming: Future[Collected], phase: Phase) -> Collected:
        phase("wait")
        while not wait([coming], timeout=_POLL_S).done:
            phase("wait")
        return coming.result()

    def _make(self, step: int) -> Collected:
        seconds: dict[str, float] = defaultdict(float)
        at, since = "", time.perf_counter()

        def phase(name: str) -> None:
            nonlocal at, since
            if self._closing:
                raise Stopped
            now = time.perf_counter()
            if at:
                seconds[f"seconds_{at}"] += now - since
            at, since = name, now

        table, counts = self._source.collect(step, self._with_teacher(step), phase)
        phase("")
        return table, counts | seconds


class SharedOnline:
    """A source under several ranks: the first rank runs it, and all may sample.

    source: the first rank's, None on the others. sample: (problems, step) -> rollouts by this
    rank's copy of the current weights; it replaces the `sample` of an OnlineSource. None: the first
    rank's source samples alone, by servers, and need not be an OnlineSource.
    """

    def __init__(self, source: Online | None, sample: Sample | None, ranks: Ranks) -> None:
        self._source = source
        self._sample = sample
        self._ranks = ranks

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> Collected:
        """See `OnlineSource.collect`; the same result on every rank."""
        if self._source is None:
            return self._follow()
        source = self._source
        if self._sample is not None:
            assert isinstance(source, OnlineSource), "only this class can replace its `sample`"
            source = source.spread(self._lead)
        made = source.collect(step, with_teacher, phase)
        self._ranks.broadcast((None, made))
        return made

    def _lead(self, problems: pa.Table, step: int) -> pa.Table:
        self._ranks.broadcast((problems, step))
        return self._share(problems, step)

    def _follow(self) -> Any:
        """Sample as often as the first rank does, until it broadcasts the step's table."""
        while True:
            problems, step_or_made = self._ranks.broadcast(None)
            if problems is None:
                return step_or_made
            self._share(problems, step_or_made)

    def _share(self, problems: pa.Table, step: int) -> pa.Table:
        """Sample this rank's slice of the problems; returns the rollouts of all ranks."""
        index, count = self._ranks.index, self._ranks.count
        begin, end = (len(problems) * edge // count for edge in (index, index + 1))
        share = problems.slice(begin, end - begin)
        assert self._sample is not None
        rollouts = self._sample(share, step) if len(share) else None
        return pa.concat_tables(part for part in self._ranks.gather(rollouts) if part is not None)
