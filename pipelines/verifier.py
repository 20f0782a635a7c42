"""A pool of verification processes that survives whatever it is asked to compare.

Each worker is a fresh Python process with a pipe of its own, an address-space limit and a deadline
that the parent keeps: a late worker is killed and replaced, and the others never notice.
`ProcessPoolExecutor` cannot kill one job; threads and asyncio cannot stop a computation at all.
"""

import logging
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from ..schemas.labels import VerdictStatus
from .visible import visible

logger = logging.getLogger(__name__)

# Start of an interpreter with sympy: about a second, much longer on a loaded machine.
_START_LIMIT_S = 120.0
# A worker's own alarm, for the case that its parent is gone, comes this much after the deadline.
_ORPHAN_GRACE_S = 5.0
# A worker that dies of itself or is killed from outside gets its job a second chance.
_ATTEMPTS = 2


@dataclass(frozen=True)
class Job:
    """A gold answer and the answer to hold against it, both as LaTeX or plain text."""

    gold: str
    answer: str


@dataclass(frozen=True)
class Outcome:
    """correct: None if the comparison came to no end; seconds: from hand-over to answer."""

    status: VerdictStatus
    correct: bool | None
    seconds: float


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    since: float  # when the process, later the current job, was started (monotonic)
    ready: bool = False
    job: int | None = None
    jobs_done: int = 0

    @property
    def waited_for(self) -> bool:
        return not self.ready or self.job is not None

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

    def judge(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One outcome per job, in order; equal jobs are judged once.

        An equal job's outcome repeats that of the first, with 0 seconds.

        Raises:
            RuntimeError: a worker does not start.
        """
        unique = list(dict.fromkeys(jobs))
        outcomes = dict(zip(unique, self._judge_unique(unique), strict=True))
        judged, seen = [], set()
        for job in jobs:
            outcome = outcomes[job]
            judged.append(Outcome(outcome.status, outcome.correct, 0.0) if job in seen else outcome)
            seen.add(job)
        return judged

    def close(self) -> None:
        """Kill the workers and wait for their end; the pool starts new ones if used again."""
        while self._workers:
            self._workers.pop().kill()

    def _judge_unique(self, jobs: list[Job]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = deque(range(len(jobs)))
        attempts: Counter[int] = Counter()
        try:
            while len(outcomes) < len(jobs):
                self._hand_out(jobs, pending)
                for worker in self._wait():
                    job, started = worker.job, worker.since
                    outcome = self._receive(worker)
                    if job is None:
                        continue
                    attempts[job] += 1
                    if outcome is None and attempts[job] < _ATTEMPTS:
                        pending.appendleft(job)
                        continue
                    status, correct = outcome or (VerdictStatus.ERROR, None)
                    outcomes[job] = Outcome(status, correct, time.monotonic() - started)
        except BaseException:
            # Answers to this call must not reach the next one.
            self.close()
            raise
        return [outcomes[index] for index in range(len(jobs))]

    def _hand_out(self, jobs: list[Job], pending: deque[int]) -> None:
        """Give waiting jobs to idle workers; start workers while there are jobs for them."""
        for worker in self._workers:
            if pending and not worker.waited_for:
                worker.job, worker.since = pending.popleft(), time.monotonic()
                job = jobs[worker.job]
                # A worker that died while idle: its closed pipe is read next.
                with suppress(BrokenPipeError, ConnectionResetError):
                    worker.connection.send(
                        (job.gold, job.answer, self._timeout_s + _ORPHAN_GRACE_S)
                    )
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._limit and starting < len(pending):
            self._workers.append(_start_worker(self._memory_mib))
            starting += 1

    def _wait(self) -> list[_Worker]:
        """The workers that have answered, died or run late, as soon as there is one."""
        waited = [worker for worker in self._workers if worker.waited_for]
        remaining = min(self._deadline(worker) for worker in waited) - time.monotonic()
        answered = wait([worker.connection for worker in waited], max(remaining, 0))
        now = time.monotonic()
        return [w for w in waited if w.connection in answered or self._deadline(w) <= now]

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._timeout_s if worker.ready else _START_LIMIT_S)

    def _receive(self, worker: _Worker) -> tuple[VerdictStatus, bool | None] | None:
        """What became of the worker's job; None if the worker died without a verdict."""
        if not worker.connection.poll():
            self._replace(worker)
            if not worker.ready:
                raise RuntimeError(f"a verification worker did not start in {_START_LIMIT_S} s")
            return VerdictStatus.TIMEOUT, None
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            return self._bury(worker)
        if not worker.ready:
            worker.ready = True
            return None
        status, correct, error = message
        if error:
            logger.warning("math-verify failed on an answer: %s", visible(error))
        worker.job = None
        worker.jobs_done += 1
        if status == VerdictStatus.OOM or worker.jobs_done >= self._recycle_every:
            self._replace(worker)
        return status, correct

    def _bury(self, worker: _Worker) -> tuple[VerdictStatus, bool | None] | None:
        code = worker.process.wait()
        self._replace(worker)
        if not worker.ready:
            raise RuntimeError(f"a verification worker ended at its start with exit code {code}")
        logger.warning("verification worker ended with exit code %d", code)
        return (VerdictStatus.TIMEOUT, None) if code == -signal.SIGALRM else None

    def _replace(self, worker: _Worker) -> None:
        """End a worker; the next job that waits starts another one."""
        worker.kill()
        self._workers.remove(worker)


def _start_worker(memory_mib: int) -> _Worker:
    ours, theirs = Pipe()
    # Not multiprocessing's spawn: it imports the parent's main module, with torch and Prefect, into
    # every worker. -P keeps the working directory off the module path, where a checkout's `trace`
    # folder would hide the standard library's module. A session of its own keeps Ctrl-C away.
    command = [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.verify_worker"]
    process = subprocess.Popen(
        [*command, str(theirs.fileno()), str(memory_mib)],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    return _Worker(process, ours, time.monotonic())
