"""Verifications per second on one core: ours in worker processes, and plain math-verify.

    make bench-verify
    make bench-verify ARGUMENTS=--rewards     the parts of verify.rewards: verify_rewards.py

- Ordinary: pairs of gold and answer, each once, from verify_pairs.py.
- Repeated: the same pairs again. Ours is the stage's code: plain numbers and words are compared in
  process, everything else in one worker; `per_second_workers_only` sends everything to the worker.
  math-verify is `parse` of both sides and `verify` with its own timeouts, in one process. They take
  turns, pinned to one core with their workers, warmed up with other pairs; the median of the rounds
  counts. A second here is a CPU second of all processes (Linux), so that other load on the machine
  does not count; `seconds` is wall time.
- Hostile, by wall time: every row of tests/pipelines/verifiers/hostile_answers.jsonl. math-verify's
  process is killed after KILL_S on one row, because its alarm cannot interrupt an integer power,
  and is limited to MEMORY_MIB. wrong: incorrect answers judged correct. peak_mib: most memory
  mapped by the process that compares.

Prints tables and writes benchmarks/results/verify.json.
"""

import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import verify_rewards
from rich.console import Console
from rich.table import Table
from verify_pairs import hostile_rows, ordinary_pairs

from trace_opd.pipelines.verifiers.pool import Job, VerifierPool
from trace_opd.pipelines.verifiers.reading import exact_match

ROOT = Path(__file__).parents[1]
ROUNDS = 3
TIMEOUT_S, MEMORY_MIB, KILL_S, MAX_CHARS = 1.0, 2048, 12.0, 50_000


# --- the verifiers -------------------------------------------------------------------------------


def ours(pool: VerifierPool, jobs: list[Job]) -> list[bool | None]:
    """As in pipelines/verifiers/verdicts.py: plain numbers and words need no worker."""
    known = {job: exact_match(*job) for job in jobs}
    asked = [job for job in jobs if known[job] is None]
    known |= {job: outcome.correct for job, outcome in zip(asked, pool.judge(asked), strict=True)}
    return [known[job] for job in jobs]


def naive(job: Job) -> bool:
    from math_verify import parse, verify

    gold, answer = job
    return verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}"))


def rates(jobs: list[Job], warm_up: list[Job]) -> dict[str, tuple[float, float]]:
    """CPU seconds and wall seconds by name, from the round with the median CPU seconds."""
    taken: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("ours", "workers only", "ours again", "math_verify", "naive again")
    }
    for job in warm_up:
        naive(job)
    for _ in range(ROUNDS):
        for name, judge in (("ours", ours), ("workers only", VerifierPool.judge)):
            pool = VerifierPool(1, 10.0, MEMORY_MIB, recycle_every=10**9)
            pool.judge(warm_up)
            taken[name].append(_seconds(lambda: judge(pool, jobs)))  # noqa: B023
            if judge is ours:
                taken["ours again"].append(_seconds(lambda: ours(pool, jobs)))  # noqa: B023
            pool.close()
        taken["math_verify"].append(_seconds(lambda: [naive(job) for job in jobs]))
        taken["naive again"].append(_seconds(lambda: [naive(job) for job in jobs]))
    return {name: statistics.median_low(times) for name, times in taken.items()}


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    children = _children()
    cpu = time.process_time() + sum(map(_cpu_seconds, children))
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return time.process_time() + sum(map(_cpu_seconds, children)) - cpu, seconds


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def _cpu_seconds(pid: str) -> float:
    fields = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(fields[0]) / 1e9


# --- hostile answers -----------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most MiB that any child process had mapped (Linux), in a list of one."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for pid in _children():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                peak = status.partition("VmPeak:")[2].split()
                most[0] = max(most[0], int(peak[0]) // 1024 if peak else 0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def hostile_ours(rows: list[tuple[Job, bool]]) -> dict[str, Any]:
    pool = VerifierPool(1, TIMEOUT_S, MEMORY_MIB)
    pool.judge([Job("x", "y")])
    short = [(job, right) for job, right in rows if len(job[1]) <= MAX_CHARS]
    with watched() as most:
        began = time.perf_counter()
        known = {job: exact_match(*job) for job, _ in short}
        asked = [job for job in known if known[job] is None]
        outcomes = pool.judge(asked)
        seconds = time.perf_counter() - began
    pool.close()
    known |= {job: outcome.correct for job, outcome in zip(asked, outcomes, strict=True)}
    return {
        "case": "hostile",
        "implementation": "ours",
        "per_second": len(rows) / seconds,
        "seconds": seconds,
        "jobs": len(rows),
        "peak_mib": most[0],
        "slowest_seconds": max(outcome.seconds for outcome in outcomes),
        "killed": sum(outcome.status == "timeout" for outcome in outcomes),
        "wrong": sum(known[job] is True and not right for job, right in short),
    }


def serve_naive(pipe: Connection) -> None:
    logging.disable(logging.CRITICAL)
    limit = 2 * MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    naive(Job("1", "2"))
    pipe.send(None)
    while True:
        job = pipe.recv()
        try:
            pipe.send(naive(job))
        except BaseException as error:  # its timeout is no subclass of Exception
            pipe.send(type(error).__name__)


def start_naive() -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve_naive, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    pipe.recv()
    return pipe, process


def hostile_naive(rows: list[tuple[Job, bool]], console: Console) -> dict[str, Any]:
    waited, killed, died, wrong, slowest = 0.0, 0, 0, 0, 0.0
    pipe, process = start_naive()
    with watched() as most, console.status("math-verify on hostile answers") as status:
        for index, (job, right) in enumerate(rows):
            status.update(f"math-verify on hostile answers: {index} of {len(rows)}")
            began = time.perf_counter()
            pipe.send(job)
            try:
                verdict = pipe.recv() if pipe.poll(KILL_S) else "late"
            except (EOFError, OSError):
                verdict = "died"
            seconds = time.perf_counter() - began
            waited, slowest = waited + seconds, max(slowest, seconds)
            wrong += verdict is True and not right
            killed += verdict == "late"
            died += verdict == "died"
            if verdict in ("late", "died"):
                process.kill()
                process.join()
                pipe, process = start_naive()
    process.kill()
    process.join()
    return {
        "case": "hostile",
        "implementation": "math_verify",
        "per_second": len(rows) / waited,
        "seconds": waited,
        "jobs": len(rows),
        "peak_mib": most[0],
        "slowest_seconds": slowest,
        "killed": killed,
        "died": died,
        "wrong": wrong,
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    if "--rewards" in sys.argv:
        verify_rewards.main()
        return
    console = Console()
    jobs = ordinary_pairs(seed=1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    with console.status("ordinary answers"):
        taken = rates(jobs, ordinary_pairs(seed=2)[:400])
    os.sched_setaffinity(0, cores)
    rows: list[dict[str, Any]] = []
    for case, implementation, name in [
        ("ordinary", "ours", "ours"),
        ("ordinary", "math_verify", "math_verify"),
        ("repeated", "ours", "ours again"),
        ("repeated", "math_verify", "naive again"),
    ]:
        rows.append(
            {
                "case": case,
                "implementation": implementation,
                "per_second": len(jobs) / taken[name][0],
                "seconds": taken[name][1],
                "jobs": len(jobs),
            }
        )
    rows[0]["per_second_workers_only"] = len(jobs) / taken["workers only"][0]
    rows[0]["decided_without_worker"] = sum(exact_match(*job) is not None for job in jobs)
    hostile = hostile_rows()
    if "--ordinary" not in sys.argv:
        with console.status("hostile answers"):
            rows.append(hostile_ours(hostile))
        rows.append(hostile_naive(hostile, console))
    table = Table(title=f"{len(jobs):,} ordinary and {len(hostile)} hostile answers, one core")
    for column in ("", "", "a second", "slowest s", "peak MiB", "killed", "wrong"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row.get(key, "") for key in ("peak_mib", "killed", "wrong"))
        slowest = f"{row['slowest_seconds']:.1f}" if "slowest_seconds" in row else ""
        table.add_row(
            row["case"],
            row["implementation"],
            f"{row['per_second']:,.1f}",
            slowest,
            *map(str, cells),
        )
    console.print(table)
    console.print(f"Ours, all in the worker: {rows[0]['per_second_workers_only']:,.1f} a second.")
    target = ROOT / "benchmarks" / "results" / "verify.json"
    target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
