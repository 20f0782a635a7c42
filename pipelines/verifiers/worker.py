"""One verification worker: a process that judges until its pipe closes.

Started by pool.py as `python -m trace_opd.pipelines.verifiers.worker <fd> <memory MiB> <seconds>
[<module> <config>]`, so it imports neither the parent's main module nor torch. A job is (gold,
answer), or the arguments of the judge that the module makes of its config.
"""

import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ...schemas.errors import InputError
from ...schemas.labels import VerdictStatus
from .math import equal, read, rounds
from .notation import alternatives, approximation, conflict

READY = ""  # any other text is why the worker cannot start
Judgement = tuple[VerdictStatus, bool | None, str]

# ru_maxrss counts KiB, but bytes on macOS.
_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def judge(gold: str, answer: str) -> Judgement:
    """Status, whether the answer equals the gold, and what went wrong if something did."""
    try:
        parsed_gold = read(gold)
        if parsed_gold is None:
            return VerdictStatus.GOLD_UNPARSED, None, ""
        if gold.strip() == answer.strip():
            return VerdictStatus.OK, True, ""
        if conflict(gold, answer):
            return VerdictStatus.OK, False, ""
        parsed_answer = read(answer)
        if parsed_answer is None:
            return VerdictStatus.PRED_UNPARSED, False, ""
        correct = equal(parsed_gold, parsed_answer)
        if not correct and (rounded := approximation(answer)) and rounds(parsed_answer, rounded):
            correct = equal(parsed_gold, read(rounded))
        if not correct and (parts := alternatives(answer)):
            correct = all(
                (value := read(part)) is not None
                and not conflict(gold, part)
                and equal(parsed_gold, value)
                for part in parts
            )
    except MemoryError:
        return VerdictStatus.OOM, None, ""
    except Exception as error:  # sympy's error on an odd answer is a row, not a crash
        return VerdictStatus.ERROR, None, f"{type(error).__name__}: {str(error)[:200]}"
    return VerdictStatus.OK, correct, ""


def peak_mib() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // _UNITS_PER_MIB


def serve(connection: Connection, memory_mib: int, orphan_s: float, *judging: str) -> None:
    """Answer jobs until the other end closes. judging: a module of this package, whose `judge_by`
    makes the judge, and its config; none: math-verify judges.
    """
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    judge_job: Callable[..., tuple[Any, ...]] = judge
    if not judging:
        judge("\\frac{1}{2}", "0.25+x")  # the first comparison fills sympy's tables
    else:
        module, config = judging
        try:
            judge_job = importlib.import_module(f".{module}", __package__).judge_by(config)
        except InputError as error:
            connection.send(str(error))
            return
    connection.send(READY)
    own = os.getpid()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        # The parent kills a worker at its deadline. If the parent itself was killed, the alarm's
        # default action ends this process, which can't read the pipe's end while sympy computes.
        signal.setitimer(signal.ITIMER_REAL, orphan_s)
        suspicious_mib = max(memory_mib // 2, peak_mib())
        judgement = judge_job(*job)
        if os.getpid() != own:  # a reward of one's own has forked: one of the two answers
            os._exit(0)
        # sympy and math-verify swallow MemoryError and return "not equal", which proves nothing.
        # Half of the limit is far above the memory of any honest comparison.
        if not judging and not judgement[1] and peak_mib() > suspicious_mib:
            judgement = (VerdictStatus.OOM, None, "")
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(judgement)


if __name__ == "__main__":
    with suppress(OSError):  # the parent was killed, or a reward of one's own closed the pipe
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
