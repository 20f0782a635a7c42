"""The pool of verification workers: equality, hostile answers, dead workers."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_opd.pipelines.verifiers.pool import Job, VerifierPool
from trace_opd.schemas.labels import VerdictStatus

# Above an honest comparison's time on a loaded machine, far below a hostile one's.
TIMEOUT_S = 3.0
HOSTILE = Job("2", r"\binom{1000000000}{500000000}")
GREEDY = Job("5", r"\lfloor 2^{30000000000} \rfloor")
NUMBERS = itertools.count()
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    pool = VerifierPool(workers=1, timeout_s=TIMEOUT_S, memory_mib=1024)
    yield pool
    pool.close()


def parent_of(pid: int) -> int | None:
    """Parent of a live process; None if the process has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(parent)


def worker_pids(parent: int | None = None) -> set[int]:
    """Live verification workers that are children of a process, by default of this one."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    children = [pid for pid in pids if parent_of(pid) == (parent or os.getpid())]
    return {p for p in children if b"verifiers.worker" in Path(f"/proc/{p}/cmdline").read_bytes()}


def warm(pool: VerifierPool) -> None:
    """Start a worker, with a job that is not cached."""
    pool.judge([Job("x", f"{next(NUMBERS)}y")])


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        (r"\sqrt{2}", r"2^{1/2}", True),  # a bare gold parses to nothing: it is wrapped
        ("A", "A", True),
        (r"\frac{1}{2}", "0.5", True),
        ("1<x<2", "(1,2)", True),  # gold first: the order matters
        ("(1,2)", "1<x<2", False),
        ("9", r"9\%", True),
        ("0.09", r"9\%", True),
        ("9.5", r"9.5\%", True),
        (r"\{1,2\}", "(1,2)", False),
        ("(3,-5)", "(-5,3)", False),
        ("(3,-5)", "(3,-5)", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("12", r"12\text{ cm}", True),  # units and bases are dropped
        ("1010_2", "1010", True),
        ("1", "1 and 2", False),  # two answers
        ("1234", "1,234", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("7", "I think it is 7", False),  # no number is taken from prose
    ],
)  # test_verify_answers.py has a table of many more
def test_answers_are_compared_as_mathematics(
    pool: VerifierPool, gold: str, answer: str, correct: bool
):
    (outcome,) = pool.judge([Job(gold, answer)])
    assert (outcome.status, outcome.correct) == (VerdictStatus.OK, correct)
    assert outcome.seconds > 0


def test_a_parse_failure_names_its_side(pool: VerifierPool):
    bad_gold, bad_answer = pool.judge([Job("}{", "5"), Job("5", "}{")])
    assert (bad_gold.status, bad_gold.correct) == (VerdictStatus.GOLD_UNPARSED, None)
    assert (bad_answer.status, bad_answer.correct) == (VerdictStatus.PRED_UNPARSED, False)


def test_a_gold_that_does_not_parse_is_unscored_even_for_an_equal_answer(pool: VerifierPool):
    # Otherwise only the correct responses of the group would have a reward.
    (outcome,) = pool.judge([Job("}{", "}{")])
    assert outcome.status == VerdictStatus.GOLD_UNPARSED


def test_equal_jobs_are_judged_once_and_keep_their_place(pool: VerifierPool):
    jobs = [Job("4x", "x+3x"), Job("4x", "3x"), Job("4x", "x+3x"), Job("4x", "x+3x")]
    outcomes = pool.judge(jobs)
    assert [outcome.correct for outcome in outcomes] == [True, False, True, True]
    assert [outcome.seconds > 0 for outcome in outcomes] == [True, True, False, False]
    again = pool.judge(jobs[1:3])
    assert [(outcome.correct, outcome.seconds) for outcome in again] == [(False, 0), (True, 0)]


def test_an_outcome_that_is_no_verdict_is_not_remembered(pool: VerifierPool):
    first, again = (pool.judge([HOSTILE])[0] for _ in range(2))
    assert first.status == again.status == VerdictStatus.TIMEOUT
    assert again.seconds > 0


# --- hostile answers and dead workers ------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("job", [GREEDY, HOSTILE])
def test_a_hostile_answer_costs_its_deadline_and_its_worker(pool: VerifierPool, job: Job):
    warm(pool)
    before = worker_pids()
    start = time.monotonic()
    hostile, ordinary = pool.judge([job, Job("2x", "x+x" + " " * next(NUMBERS))])
    assert hostile.status in (VerdictStatus.TIMEOUT, VerdictStatus.OOM)
    assert hostile.correct is None
    assert (ordinary.status, ordinary.correct) == (VerdictStatus.OK, True)
    assert time.monotonic() - start < TIMEOUT_S + 20
    assert len(before) == 1
    assert len(worker_pids()) == 1
    assert not before & worker_pids()


def test_an_answer_above_the_memory_limit_is_oom_although_sympy_catches_the_error():
    pool = VerifierPool(workers=1, timeout_s=60, memory_mib=256)
    hostile, ordinary = pool.judge([GREEDY, Job("2x", "x+x")])
    pool.close()
    assert (hostile.status, hostile.correct) == (VerdictStatus.OOM, None)
    assert (ordinary.status, ordinary.correct) == (VerdictStatus.OK, True)


@needs_proc
def test_a_job_whose_worker_is_killed_is_judged_by_another(pool: VerifierPool):
    warm(pool)
    (victim,) = worker_pids()
    os.kill(victim, signal.SIGSTOP)  # it receives the job and never starts it
    killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    killer.start()
    outcomes = pool.judge([Job("2x", "x+x"), Job("2x", "5x")])
    killer.join()
    assert [outcome.correct for outcome in outcomes] == [True, False]
    assert victim not in worker_pids()


@needs_proc
def test_jobs_that_wait_in_the_pipe_of_a_late_worker_are_judged_by_the_next(pool: VerifierPool):
    jobs = [Job("2x", f"{i}x+x") for i in range(3, 9)]
    outcomes = pool.judge([jobs[0], HOSTILE, *jobs[1:3], HOSTILE, *jobs[3:]])
    assert [outcome.status for outcome in outcomes].count(VerdictStatus.TIMEOUT) == 2
    assert outcomes[1].status == outcomes[4].status == VerdictStatus.TIMEOUT
    assert [outcome.correct for outcome in outcomes].count(False) == len(jobs)


def test_long_answers_do_not_fill_the_pipe_of_a_worker_that_computes(pool: VerifierPool):
    long = [Job("x", "\\boxed " + "y" * 200_000 + str(i)) for i in range(6)]
    outcomes = pool.judge([HOSTILE, *long])
    assert outcomes[0].status == VerdictStatus.TIMEOUT
    assert {outcome.status for outcome in outcomes[1:]} == {VerdictStatus.PRED_UNPARSED}


@needs_proc
def test_a_worker_that_died_while_idle_is_replaced(pool: VerifierPool):
    warm(pool)
    (victim,) = worker_pids()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in worker_pids())
    (outcome,) = pool.judge([Job("2x", "x+x")])
    assert outcome.correct is True


@needs_proc
def test_workers_are_replaced_after_a_number_of_jobs_and_gone_after_close():
    others = worker_pids()
    pool = VerifierPool(workers=1, timeout_s=60, memory_mib=1024, recycle_every=2)
    warm(pool)
    first = worker_pids() - others
    outcomes = pool.judge([Job("x", f"{i}x") for i in range(2, 4)])
    assert [outcome.correct for outcome in outcomes] == [False, False]
    assert len(first) == 1
    assert not first & worker_pids()
    pool.close()
    assert worker_pids() == others


@needs_proc
def test_workers_end_when_their_parent_is_killed():
    script = (
        "from trace_opd.pipelines.verifiers.pool import *\n"
        f"pool = VerifierPool(1, {TIMEOUT_S}, 1024)\n"
        "pool.judge([Job('x', 'y')])\n"
        "print('warm', flush=True)\n"
        f"pool.judge([Job('{HOSTILE[0]}', r'{HOSTILE[1]}')])\n"
        "import time; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (worker,) = worker_pids(parent.pid)
        time.sleep(0.5)  # the hostile job is running
        parent.kill()

    wait_until(lambda: parent_of(worker) is None)


def test_a_worker_imports_neither_torch_nor_prefect():
    script = (
        "import sys, trace_opd.pipelines.verifiers.worker\n"
        "sys.exit(bool({'torch', 'transformers', 'prefect', 'pyarrow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
