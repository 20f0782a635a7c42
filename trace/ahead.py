"""Online sources whose sampler has weights of its own: it gets the current ones before each step,
or, one step ahead, samples the next step while this one trains.

For the latter the weights pass to the sampler at a step's beginning, when it has nothing else to do; the rollouts
that it makes from then on are trained on one step later. So they are one step off-policy, never
more, and no copy of the weights has to wait for a sampler that is busy.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from ..schemas.errors import Stopped
from .trainer import Online

_LOOK_S = 0.5  # between looks at whether the run was asked to stop

Made = tuple[Any, dict[str, float]]


@dataclass(frozen=True)
class Following:
    """An online source whose sampler gets the current weights before each step.

    follow: gives them to it. rest: nothing is sampled until then.
    """

    source: Online
    follow: Callable[[], None]
    rest: Callable[[], None]

    def collect(self, step: int, with_teacher: bool, phase: Callable[[str], None]) -> Made:
        """See `OnlineSource.collect`."""
        phase("weights")
        self.follow()
        made = self.source.collect(step, with_teacher, phase)
        self.rest()
        return made


class Ahead:
    """An online source that works one step ahead in a thread of its own.

    source: touched by that thread alone once the first step is made. follow: gives its sampler the
    current weights. with_teacher: whether a step has one. steps: where the run ends.
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
        self._next: tuple[int, Future[Made]] | None = None
        self._closing = False

    def collect(self, step: int, with_teacher: bool, phase: Callable[[str], None]) -> Made:
        """See `OnlineSource.collect`. The first step of a run, and of a resumed one, is on-policy.

        The counts hold the seconds of the phases that ran beside training; waiting for them is a
        phase of the step's own.
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
        """Let the step in the making end at its next phase."""
        self._closing = True
        self._thread.shutdown(wait=True)

    def _await(self, coming: Future[Made], phase: Callable[[str], None]) -> Made:
        phase("wait")
        while not wait([coming], timeout=_LOOK_S).done:
            phase("wait")
        return coming.result()

    def _make(self, step: int) -> Made:
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
