"""A pool of verification processes that survives every answer it compares.

Called by the verifiers and by the check of gold answers. Each worker is a fresh Python process
with a pipe, an address-space limit and a deadline per job that the parent keeps: a late worker is
killed and replaced without effect on the others. A few jobs wait in a worker's pipe, so that it
never waits for the parent. `ProcessPoolExecutor` cannot kill one job; threads and asyncio cannot
stop a computation at all.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from ...schemas.errors import InputError
from ...schemas.labels import VerdictStatus
from ..progress import count_rows
from ..terminal import visible

logger = logging.getLogger(__name__)

# Start of an interpreter with sympy: about a second, much longer on a loaded machine.
_START_LIMIT_S = 120.0
# Time after the deadline of a worker's own alarm, which ends it if its parent is gone.
_ORPHAN_GRACE_S = 5.0
# A job whose worker dies, or is killed from outside, is tried once more.
_ATTEMPTS = 2
# Jobs in a worker's pipe, and their characters. More could fill it: the parent would then block in
# a write to a worker that computes, and keep no deadline.
_AHEAD, _AHEAD_CHARS = 8, 8192
# Outcomes kept for later calls: problems and short answers repeat.
_REMEMBERED, _REMEMBERED_CHARS = 50_000, 200
_REPEATABLE = {VerdictStatus.OK, VerdictStatus.PRED_UNPARSED, VerdictStatus.GOLD_UNPARSED}


class Job(tuple[str, ...]):
    """The texts that a worker's judge takes: a gold answer and the answer to compare with it, both
    as LaTeX or plain text; or the arguments of a reward of one's own.
    """

    __slots__ = ()

    def __new__(cls, *texts: str) -> "Job":
        return super().__new__(cls, texts)

    @property
    def chars(self) -> int:
        return sum(map(len, self))


@dataclass(frozen=True)
class WorkerJudge:
    """What judges in a worker in place of math-verify.

    module: of this package, whose `judge_by(config)` returns the judge; config: text; label: names
    it in messages; hint: what to do where a worker does not start.
    """

    module: str
    config: str
    label: str
    hint: str


@dataclass(frozen=True)
class Outcome:
    """correct: None if the comparison did not end. seconds: the worker's, wall clock. reward,
    feedback: of a reward of one's own.
    """

    status: VerdictStatus
    correct: bool | None
    seconds: float
    reward: float | None = None
    feedback: str | None = None


# Status, correct, and of a reward of one's own reward and feedback.
Judged = tuple[Any, ...]


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    since: float  # monotonic start of the process, later of the first of its jobs
    ready: bool = False
    jobs: deque[tuple[int, Job]] = field(default_factory=deque)
    jobs_done: int = 0

    @property
    def waited_for(self) -> bool:
        return not self.ready or bool(self.jobs)

    def kill(self) -> int:
        """End the process and what a reward of one's own has forked there; its exit code."""
        with suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


class VerifierPool:
    """Up to `workers` processes, started when there is work for them, ended by `close`.

    timeout_s: deadline per job, start-up not counted; memory_mib: address space per worker;
    recycle_every: jobs after which a worker is replaced, because sympy's caches only grow; judge:
    in place of math-verify.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        memory_mib: int,
        recycle_every: int = 2000,
        judge: WorkerJudge | None = None,
    ) -> None:
        self._limit = workers
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._recycle_every = recycle_every
        self._judge = judge
        self._workers: list[_Worker] = []
        self._known: OrderedDict[Job, Outcome] = OrderedDict()

    def judge(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One outcome per job, in order; equal jobs are judged once, in later calls too.

        An equal job repeats the outcome of the first, with 0 seconds. A job that ended without a
        verdict is tried again by a later call.

        Raises:
            RuntimeError: a worker does not start; InputError: nor does it with a judge of its own.
        """
        fresh = [job for job in dict.fromkeys(jobs) if job not in self._known]
        judged = dict(zip(fresh, self._judge_unique(fresh), strict=True))
        outcomes = []
        for job in jobs:
            outcome = judged.pop(job, None)
            if outcome is None:
                outcome = self._known[job]
            else:
                self._known[job] = replace(outcome, seconds=0.0)
            outcomes.append(outcome)
        self._forget(fresh)
        return outcomes

    def close(self) -> None:
        """Kill the workers and wait for their end; the pool starts new ones if used again."""
        while self._workers:
            self._workers.pop().kill()

    def _forget(self, fresh: list[Job]) -> None:
        """Drop outcomes that may differ the next time, long jobs, and the oldest."""
        for job in fresh:
            lasting = self._known[job].status in _REPEATABLE
            if not lasting or job.chars > _REMEMBERED_CHARS:
                del self._known[job]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _judge_unique(self, jobs: list[Job]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = deque(enumerate(jobs))
        attempts: Counter[int] = Counter()
        try:
            while len(outcomes) < len(jobs):
                self._hand_out(pending)
                for worker in self._wait():
                    self._serve(worker, outcomes, attempts)
                    if worker not in self._workers:
                        pending.extendleft(reversed(worker.jobs))
        except BaseException:
            # Answers to this call must not reach the next one.
            self.close()
            raise
        return [outcomes[index] for index in range(len(jobs))]

    def _hand_out(self, pending: deque[tuple[int, Job]]) -> None:
        """Give waiting jobs to workers, idle ones first; start workers while there are jobs."""
        for depth in range(_AHEAD):
            for worker in self._workers:
                if pending and len(worker.jobs) == depth and self._has_room(worker, pending[0][1]):
                    self._send(worker, *pending.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._limit and starting < len(pending):
            self._workers.append(self._start_worker())
            starting += 1

    def _has_room(self, worker: _Worker, job: Job) -> bool:
        if not worker.ready or worker.jobs_done + len(worker.jobs) >= self._recycle_every:
            return False
        chars = sum(waiting.chars for _, waiting in worker.jobs)
        return not worker.jobs or chars + job.chars <= _AHEAD_CHARS

    def _send(self, worker: _Worker, index: int, job: Job) -> None:
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append((index, job))
        # If the worker died while idle, its closed pipe is read next.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(tuple(job))

    def _wait(self) -> list[_Worker]:
        """The workers that have answered, died or run late, as soon as there is one."""
        waited = [worker for worker in self._workers if worker.waited_for]
        remaining = min(self._deadline(worker) for worker in waited) - time.monotonic()
        answered = wait([worker.connection for worker in waited], max(remaining, 0))
        now = time.monotonic()
        return [w for w in waited if w.connection in answered or self._deadline(w) <= now]

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._timeout_s if worker.ready else _START_LIMIT_S)

    def _serve(self, worker: _Worker, outcomes: dict[int, Outcome], attempts: Counter[int]) -> None:
        """Read all that a worker has sent. Afterwards a dead or late one is not in the pool."""
        while worker.waited_for:
            if not worker.ready:
                self._await_ready(worker)
            else:
                started, (index, job) = worker.since, worker.jobs.popleft()
                judged = self._receive(worker)
                attempts[index] += judged is None
                if judged is None and attempts[index] < _ATTEMPTS:
                    worker.jobs.appendleft((index, job))
                else:
                    status, correct, *own = judged or (VerdictStatus.ERROR, None)
                    count_rows()
                    outcomes[index] = Outcome(status, correct, time.monotonic() - started, *own)
            if worker not in self._workers or not worker.connection.poll():
                return

    def _receive(self, worker: _Worker) -> Judged | None:
        """The verdict on a worker's first job; None if the worker died without one."""
        if not worker.connection.poll():
            self._replace(worker)
            return VerdictStatus.TIMEOUT, None
        try:
            status, correct, error, *own = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            code = worker.process.wait()
            self._replace(worker)
            logger.warning("verification worker ended with exit code %d", code)
            return (VerdictStatus.TIMEOUT, None) if code == -signal.SIGALRM else None
        if error:
            judge = "math-verify" if self._judge is None else self._judge.label
            logger.warning("%s failed on a response: %s", judge, visible(error))
        worker.since = time.monotonic()
        worker.jobs_done += 1
        if status == VerdictStatus.OOM or worker.jobs_done >= self._recycle_every:
            self._replace(worker)
        return status, correct, *own

    def _replace(self, worker: _Worker) -> None:
        """End a worker; the next waiting job starts another one."""
        worker.kill()
        self._workers.remove(worker)

    def _await_ready(self, worker: _Worker) -> None:
        """Raises RuntimeError if the worker ended, or has not started in time; InputError if the
        judge of its own is the reason.
        """
        if not worker.connection.poll():
            raise self._no_start(f"did not start in {_START_LIMIT_S} s")
        try:
            fault = worker.connection.recv()
        except (EOFError, OSError):
            code = worker.process.wait()
            raise self._no_start(f"ended at its start with exit code {code}") from None
        if fault:
            raise InputError(fault)
        worker.ready = True

    def _no_start(self, what: str) -> Exception:
        if self._judge is None:
            return RuntimeError(f"a verification worker {what}")
        return InputError(
            f"{self._judge.label}: its worker {what}; {self._judge.hint} ({self._memory_mib})"
        )

    def _start_worker(self) -> _Worker:
        ours, theirs = Pipe()
        # Not multiprocessing's spawn: it imports the parent's main module, with torch and Prefect,
        # in each worker. -P keeps the working directory off the module path: a checkout's `trace`
        # folder would shadow the standard library's module. A session of its own keeps Ctrl-C away.
        command = [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.worker"]
        limits = [str(self._memory_mib), str(self._timeout_s + _ORPHAN_GRACE_S)]
        judge = [] if self._judge is None else [self._judge.module, self._judge.config]
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), *limits, *judge],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        return _Worker(process, ours, time.monotonic())
