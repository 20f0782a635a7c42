"""Wrong verdicts of our verifier and of plain math-verify on answers with known verdicts.

    make bench-judge

The sets are those of judging_pairs.py. Ours reads and judges a response as stage verify does, in
worker processes. math-verify is `parse` of the boxed gold and of the response, and `verify`; for
choices its extraction of single letters. A wrong 1 is a wrong answer that is rewarded, a wrong 0 a
right one that is not. "theirs alone" and "ours alone" count the wrong 1s that one of both gives.

Prints a table and writes benchmarks/results/judging.json. With --list it prints each wrong verdict
of ours; with a name it judges only the sets whose names contain it.
"""

import json
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from judging_pairs import Case, sets
from rich.console import Console
from rich.table import Table

from trace_opd.pipelines.verifiers.pool import Job, VerifierPool
from trace_opd.pipelines.verifiers.reading import (
    choice_letter,
    exact_match,
    final_answer,
    letter_of,
)

ROOT = Path(__file__).parents[1]
WORKERS, TIMEOUT_S, MEMORY_MIB = 2, 10.0, 2048


def ours(pool: VerifierPool, cases: list[Case]) -> list[bool]:
    """As in pipelines/verifiers/verdicts.py."""
    known: dict[int, bool] = {}
    jobs: dict[int, Job] = {}
    for index, case in enumerate(cases):
        if case.is_choice:
            known[index] = choice_letter(case.response) == letter_of(case.gold)
            continue
        answer = final_answer(case.response)
        equal = False if answer is None else exact_match(case.gold, answer)
        if equal is None:
            jobs[index] = Job(case.gold, answer or "")
        else:
            known[index] = equal
    outcomes = pool.judge(list(jobs.values()))
    known |= {index: outcome.correct is True for index, outcome in zip(jobs, outcomes, strict=True)}
    return [known[index] for index in range(len(cases))]


def theirs(case: Case) -> bool:
    """math-verify with its defaults; no verdict counts as 0."""
    from math_verify import StringExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    try:
        if case.is_choice:
            letters = [StringExtractionConfig(strings=tuple("ABCDEFGHIJ"))]
            return verify(parse(case.gold, letters), parse(case.response, letters))
        return verify(parse(f"\\boxed{{{case.gold}}}"), parse(case.response))
    except BaseException:  # its time-out is no subclass of Exception
        return False


def main() -> None:
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    console = Console()
    table = Table(title="Wrong verdicts")
    for column in ("set", "answers", "wrong 1", "theirs", "ours alone", "wrong 0", "theirs"):
        table.add_column(column, justify="left" if column == "set" else "right")
    rows: list[dict[str, Any]] = []
    pool = VerifierPool(WORKERS, TIMEOUT_S, MEMORY_MIB)
    with ProcessPoolExecutor(WORKERS) as executor:
        for name, cases in sets().items():
            if wanted and not any(part in name for part in wanted):
                continue
            mine = ours(pool, cases)
            other = list(executor.map(theirs, cases, chunksize=50))
            rows.append(_count(name, cases, mine, other))
            table.add_row(*map(str, rows[-1].values()))
            if "--list" in sys.argv:
                _print_wrong(name, cases, mine, other)
    pool.close()
    total = {"set": "all"} | {key: sum(row[key] for row in rows) for key in list(rows[0])[1:]}
    table.add_row(*map(str, total.values()))
    console.print(table)
    if not wanted:
        target = ROOT / "benchmarks" / "results" / "judging.json"
        target.write_text(json.dumps([*rows, total], indent=2) + "\n")


def _count(name: str, cases: list[Case], mine: list[bool], other: list[bool]) -> dict[str, Any]:
    verdicts = list(zip(cases, mine, other, strict=True))
    return {
        "set": name,
        "answers": len(cases),
        "wrong_1": sum(ours and not case.right for case, ours, _ in verdicts),
        "wrong_1_math_verify": sum(theirs and not case.right for case, _, theirs in verdicts),
        "wrong_1_ours_alone": sum(
            ours and not theirs and not case.right for case, ours, theirs in verdicts
        ),
        "wrong_0": sum(case.right and not ours for case, ours, _ in verdicts),
        "wrong_0_math_verify": sum(case.right and not theirs for case, _, theirs in verdicts),
    }


def _print_wrong(name: str, cases: list[Case], mine: list[bool], other: list[bool]) -> None:
    for case, verdict, their in zip(cases, mine, other, strict=True):
        if verdict != case.right:
            print(f"{name}\t{int(verdict)} {int(their)}\t{case.gold}\t{case.answer[-90:]!r}")


if __name__ == "__main__":
    main()
