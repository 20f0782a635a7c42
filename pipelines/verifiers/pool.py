"""A pool of verification processes that survives whatever it is asked to compare.

Each worker is a fresh Python process with a pipe of its own, an address-space limit and a deadline
that the parent keeps: a late worker is killed and replaced, and the others never notice. A worker
has a few jobs waiting in its pipe, so that it never waits for the parent; the deadline is per job.
`ProcessPoolExecutor` cannot kill one job; threads and asyncio cannot stop a computation at all.
"""

import logging
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from ...schemas.labels import VerdictStatus
from ..visible import visible

logger = logging.getLogger(__name__)

# Start of an interpreter with sympy: about a second, much longer on a loaded machine.
_START_LIMIT_S = 120.0
# A worker's own alarm, for the case that its parent is gone, comes this much after the deadline.
_ORPHAN_GRACE_S = 5.0
# A worker that dies of itself or is killed from outside gets its job a second chance.
_ATTEMPTS = 2
# Jobs in a worker's pipe, and their characters: more could fill it, and the parent, waiting to
# write to a worker that computes, would keep no deadline.
_AHEAD, _AHEAD_CHARS = 8, 8192
# Outcomes kept for later calls: groups meet the same problems again, parts repeat short answers.
_REMEMBERED, _REMEMBERED_CHARS = 50_000, 200
_REPEATABLE = {VerdictStatus.OK, VerdictStatus.PRED_UNPARSED, VerdictStatus.GOLD_UNPARSED}


@dataclass(frozen=True)
class Job:
    """A gold answer and the answer to hold against it, both as LaTeX or plain text."""

    gold: str
    answer: str


@dataclass(frozen=True)
class Outcome:
    """correct: None if the comparison came to no end; seconds: the worker's, wall clock."""

    status: VerdictStatus
    correct: bool | None
    seconds: float


Judged = tuple[VerdictStatus, bool | None]


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    since: float  # when the process, later the first of its jobs, was started (monotonic)
    ready: bool = False
    jobs: deque[int] = field(default_factory=deque)
    chars: int = 0  # of its jobs
    jobs_done: int = 0

    @property
    def waited_for(self) -> bool:
        return not self.ready or bool(self.jobs)

    def kill(self) -> int:
        """End the process for certain; its exit code."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


class VerifierPool:
    """Up to `workers` processes, started when there is work for them, ended by `close`.

    timeout_s: deadline per job, start-up not counted; memory_mib: address space per worker;
    recycle_every: jobs after which a worker is replaced, because sympy's caches only grow.
    """

    def __init__(
        self, workers: int, timeout_s: float, memory_mib: int, recycle_every: int = 2000
    ) -> None:
        self._limit = workers
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._recycle_every = recycle_every
        self._workers: list[_Worker] = []
        self._known: OrderedDict[Job, Judged] = OrderedDict()

    def judge(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One outcome per job, in order; equal jobs are judged once, in later calls too.

        An equal job's outcome repeats that of the first, with 0 seconds. What ended without a
        verdict is tried again by a later call.

        Raises:
            RuntimeError: a worker does not start.
        """
        fresh = [job for job in dict.fromkeys(jobs) if job not in self._known]
        judged = dict(zip(fresh, self._judge_unique(fresh), strict=True))
        outcomes = []
        for job in jobs:
            outcome = judged.pop(job, None)
            if outcome is None:
                outcome = Outcome(*self._known[job], 0.0)
            else:
                self._known[job] = outcome.status, outcome.correct
            outcomes.append(outcome)
        self._forget(fresh)
        return outcomes

    def close(self) -> None:
        """Kill the workers and wait for their end; the pool starts new ones if used again."""
        while self._workers:
            self._workers.pop().kill()

    def _forget(self, fresh: list[Job]) -> None:
        """Drop what may end otherwise the next time, what is long, and the oldest."""
        for job in fresh:
            lasting = self._known[job][0] in _REPEATABLE
            if not lasting or len(job.gold) + len(job.answer) > _REMEMBERED_CHARS:
                del self._known[job]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _judge_unique(self, jobs: list[Job]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = deque(range(len(jobs)))
        attempts: Counter[int] = Counter()
        try:
            while len(outcomes) < len(jobs):
                self._hand_out(jobs, pending)
                for worker in self._wait():
                    while worker.waited_for:
                        started = worker.since
                        job, judged = self._receive(worker, jobs)
                        if judged is not None and job is not None:
                            outcomes[job] = Outcome(*judged, time.monotonic() - started)
                        elif job is not None:
                            attempts[job] += 1
                            if attempts[job] < _ATTEMPTS:
                                worker.jobs.appendleft(job)
                            else:
                                outcomes[job] = Outcome(
                                    VerdictStatus.ERROR, None, time.monotonic() - started
                                )
                        if worker not in self._workers:
                            pending.extendleft(reversed(worker.jobs))
                            break
                        if not worker.connection.poll():
                            break
        except BaseException:
            # Answers to this call must not reach the next one.
            self.close()
            raise
        return [outcomes[index] for index in range(len(jobs))]

    def _hand_out(self, jobs: list[Job], pending: deque[int]) -> None:
        """Give waiting jobs to workers, idle ones first; start workers while there are jobs."""
        for depth in range(_AHEAD):
            for worker in self._workers:
                if (
                    pending
                    and len(worker.jobs) == depth
                    and self._has_room(worker, jobs[pending[0]])
                ):
                    self._send(worker, pending.popleft(), jobs)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._limit and starting < len(pending):
            self._workers.append(_start_worker(self._memory_mib, self._timeout_s + _ORPHAN_GRACE_S))
            starting += 1

    def _has_room(self, worker: _Worker, job: Job) -> bool:
        if not worker.ready or worker.jobs_done + len(worker.jobs) >= self._recycle_every:
            return False
        return not worker.jobs or worker.chars + _chars(job) <= _AHEAD_CHARS

    def _send(self, worker: _Worker, index: int, jobs: list[Job]) -> None:
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(index)
        worker.chars += _chars(jobs[index])
        # A worker that died while idle: its closed pipe is read next.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send((jobs[index].gold, jobs[index].answer))

    def _wait(self) -> list[_Worker]:
        """The workers that have answered, died or run late, as soon as there is one."""
        waited = [worker for worker in self._workers if worker.waited_for]
        remaining = min(self._deadline(worker) for worker in waited) - time.monotonic()
        answered = wait([worker.connection for worker in waited], max(remaining, 0))
        now = time.monotonic()
        return [w for w in waited if w.connection in answered or self._deadline(w) <= now]

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._timeout_s if worker.ready else _START_LIMIT_S)

    def _receive(self, worker: _Worker, jobs: list[Job]) -> tuple[int | None, Judged | None]:
        """The worker's first job and what became of it: None if it died without a verdict."""
        if not worker.connection.poll():
            self._replace(worker)
            if not worker.ready:
                raise RuntimeError(f"a verification worker did not start in {_START_LIMIT_S} s")
            return worker.jobs.popleft(), (VerdictStatus.TIMEOUT, None)
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            return self._bury(worker)
        if not worker.ready:
            worker.ready = True
            return None, None
        status, correct, error = message
        if error:
            logger.warning("math-verify failed on an answer: %s", visible(error))
        job = worker.jobs.popleft()
        worker.since = time.monotonic()
        worker.chars -= _chars(jobs[job])
        worker.jobs_done += 1
        if status == VerdictStatus.OOM or worker.jobs_done >= self._recycle_every:
            self._replace(worker)
        return job, (status, correct)

    def _bury(self, worker: _Worker) -> tuple[int | None, Judged | None]:
        code = worker.process.wait()
        self._replace(worker)
        if not worker.ready:
            raise RuntimeError(f"a verification worker ended at its start with exit code {code}")
        logger.warning("verification worker ended with exit code %d", code)
        job = worker.jobs.popleft() if worker.jobs else None
        return job, ((VerdictStatus.TIMEOUT, None) if code == -signal.SIGALRM else None)

    def _replace(self, worker: _Worker) -> None:
        """End a worker; the next job that waits starts another one."""
        worker.kill()
        self._workers.remove(worker)


def _chars(job: Job) -> int:
    return len(job.gold) + len(job.answer)


def _start_worker(memory_mib: int, orphan_s: float) -> _Worker:
    ours, theirs = Pipe()
    # Not multiprocessing's spawn: it imports the parent's main module, with torch and Prefect, into
    # every worker. -P keeps the working directory off the module path, where a checkout's `trace`
    # folder would hide the standard library's module. A session of its own keeps Ctrl-C away.
    command = [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.worker"]
    process = subprocess.Popen(
        [*command, str(theirs.fileno()), str(memory_mib), str(orphan_s)],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    return _Worker(process, ours, time.monotonic())
