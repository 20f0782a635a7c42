"""One verification worker: a process that judges (gold, answer) pairs until its pipe closes.

Started by verifier.py as `python -m trace_opd.pipelines.verify_worker <fd> <memory MiB>`, so it
imports neither the parent's main module nor torch.
"""

import logging
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from math_verify import LatexExtractionConfig, parse, verify

from ..schemas.labels import VerdictStatus

# It warns once that its timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

READY = "ready"
Judgement = tuple[VerdictStatus, bool | None, str]

# One target, tried on a box that we make around the answer: with the default targets math-verify
# would also pick a number out of a sentence.
_TARGETS = [LatexExtractionConfig()]
_NO_TIMEOUT = 0
_STATUS_FILE = Path("/proc/self/status")


def parse_answer(text: str) -> list:
    """math-verify's reading of an answer; [] if it has none.

    Wrapped in a box because a bare `\\sqrt{2}` parses to nothing. Its timeouts are off: they are
    made of SIGALRM, which works in main threads only and cancels an outer alarm. Parsing leaves
    powers and factorials unevaluated; comparing does not, and runs in workers only.
    """
    return parse(
        f"\\boxed{{{text}}}", _TARGETS, fallback_mode="no_fallback", parsing_timeout=_NO_TIMEOUT
    )


def judge(gold: str, answer: str) -> Judgement:
    """Status, whether the answer equals the gold, and what went wrong if something did."""
    try:
        parsed_gold = parse_answer(gold)
        if not parsed_gold:
            return VerdictStatus.GOLD_UNPARSED, None, ""
        if gold.strip() == answer.strip():
            return VerdictStatus.OK, True, ""
        parsed_answer = parse_answer(answer)
        if not parsed_answer:
            return VerdictStatus.PRED_UNPARSED, False, ""
        # The order matters: gold `1<x<2` accepts `(1,2)`, the reverse is refused.
        correct = verify(
            parsed_gold, parsed_answer, timeout_seconds=_NO_TIMEOUT, raise_on_error=True
        )
    except MemoryError:
        return VerdictStatus.OOM, None, ""
    except Exception as error:  # whatever sympy raises on an odd answer is a row, not a crash
        return VerdictStatus.ERROR, None, f"{type(error).__name__}: {str(error)[:200]}"
    return VerdictStatus.OK, correct, ""


def peak_mib() -> int:
    """Largest address space that this process ever had; 0 where the system does not tell."""
    if not _STATUS_FILE.exists():
        return 0
    for line in _STATUS_FILE.read_text().splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) // 1024
    return 0


def serve(connection: Connection, memory_mib: int) -> None:
    """Answer jobs (gold, answer, seconds) until the other end closes."""
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    judge("\\frac{1}{2}", "0.25+x")  # the first comparison fills sympy's tables
    connection.send(READY)
    while True:
        try:
            gold, answer, seconds = connection.recv()
        except EOFError:
            return
        # The parent kills a worker at its deadline. If the parent was killed itself, nobody reads
        # the pipe's end while sympy computes: the alarm's default action ends the process.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        suspicious_mib = max(memory_mib // 2, peak_mib())
        judgement = judge(gold, answer)
        # sympy and math-verify swallow MemoryError and go on to "not equal". Such a verdict says
        # nothing; half of the limit is far above what any honest comparison takes.
        if not judgement[1] and peak_mib() > suspicious_mib:
            judgement = (VerdictStatus.OOM, None, "")
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(judgement)


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):  # the parent was killed: nobody listens
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
