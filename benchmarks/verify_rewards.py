"""Rows per second of the parts of `verify.rewards`, on one core. Called by verify.py.

    make bench-verify ARGUMENTS=--rewards

ROWS responses of about CHARS characters, GROUP to a problem. All are different, so that no outcome
is repeated; half of the final answers are right, of reasoning-gym's tasks one of GYM_GROUP. Each
part is judged as stage verify judges it (`open_verifier`), in tables of TABLE rows, by one worker
where it has workers. Parent and worker are pinned to one core. The median of ROUNDS counts, after
some rows that warm up. A second is a CPU second of all processes (Linux), so that other load on the
machine counts little; `wall_seconds` is wall time. Programs (`code`) are few, and equal but for a
comment: each starts a sandbox.

Prints a table and writes benchmarks/results/rewards.json.
"""

import json
import logging
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import processor_name
from results import console, write_rows
from rich.table import Table

from trace_opd.data import sources
from trace_opd.pipelines.verifiers.registry import judged_columns, open_verifier
from trace_opd.schemas.configs import GymSource, VerifyConfig
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS

ROOT = Path(__file__).parents[1]
ROWS, PROGRAMS, GROUP, TABLE, CHARS, ROUNDS = 50_000, 200, 20, 5_000, 800, 3
GYM_GROUP = 200  # responses to a problem of reasoning-gym: some tasks take long to make problems
TOKENS = 220
OWN = ROOT / "examples" / "own-code" / "reward.py"
TARGETS = {"in process": 50_000, "workers": 1_000}  # rows a second
FILLER = "First I write the numbers below each other and add them from the right. "
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A part and its data. answer: of a problem, for the number of a response."""

    name: str
    where: str  # in process, workers or a sandbox
    part: Row
    problems: list[Row]
    answer: Callable[[Row, int], str]
    rows: int = ROWS
    group: int = GROUP
    box: str = "\\boxed{{{}}}"


def cases() -> Iterator[Case]:
    sums = [_problem(n, f"{n} + {n + 1}?", str(2 * n + 1)) for n in range(ROWS // GROUP)]
    choices = [_problem(n, f"Which, {n}?", "ABCD"[n % 4], "choice") for n in range(ROWS // GROUP)]
    group = r"(?s).*\\boxed\{(?P<answer>[^}]*)\}"
    for name, part in (
        ("exact", {"name": "exact"}),
        ("regex", {"name": "regex", "pattern": r"\\boxed\{\d+\}"}),
        ("regex with a group", {"name": "regex", "pattern": group}),
        ("format", {"name": "format"}),
        ("length", {"name": "length", "limit": CHARS, "slack": 200}),
        ("length in tokens", {"name": "length", "limit": 200, "slack": 50, "unit": "tokens"}),
    ):
        yield Case(name, "in process", part, sums, _number)
    letter = {"name": "choice"}
    yield Case("choice", "in process", letter, choices, lambda row, n: "ABCD"[n % 4])
    own = {"name": f"{OWN}:closeness"}
    yield Case("a function of yours", "workers", own, sums, _number)
    for task in ("chain_sum", "sudoku", "countdown"):
        made, gym = _gym(task), {"name": "gym"}
        yield Case(f"gym, {task}", "workers", gym, made, _gym_answer, group=GYM_GROUP)
    program = {"name": "code", "allow_unisolated": True}
    code = "\n\n```python\ndef total(a, b):\n    return a + {}\n```"
    tests = json.dumps({"code": {"tests": "assert total(1, 2) == 3", "entry_point": ""}})
    tested = [row | {"metadata": tests} for row in sums]
    yield Case("code", "a sandbox", program, tested, _program, PROGRAMS, box=code)


def _program(problem: Row, number: int) -> str:
    return f"{'ab'[number % 2]}  # {number}"


def _number(problem: Row, number: int) -> str:
    return problem["answer"] if number % 2 else str(number)


def _gym(task: str) -> list[Row]:
    source = GymSource(kind="reasoning-gym", task=task, scored=True)
    made = [row for row, _ in zip(sources.rows(source, 0), range(ROWS // GYM_GROUP), strict=False)]
    return [row | {"problem_id": f"p{n}", "split": "train"} for n, row in enumerate(made)]


def _gym_answer(problem: Row, number: int) -> str:
    """The right answer once in a group, else different wrong ones."""
    return f"{problem['answer']} {number}" if number % GYM_GROUP else problem["answer"]


def _problem(number: int, text: str, answer: str, kind: str = "math") -> Row:
    return {
        "problem_id": f"p{number}", "problem": text, "answer": answer, "answer_kind": kind,
        "solution": None, "steps": None, "source": "made", "split": "train",
    }  # fmt: skip


def tables(case: Case) -> list[tuple[pa.Table, pa.Table]]:
    """Problems and rollouts, TABLE rollouts each, the responses to a problem together."""
    draw = random.Random(0)
    rollout = {
        "prompt_token_ids": [1], "token_ids": [], "logprobs": [],
        "finish_reason": "stop", "policy_name": "made", "policy_revision": "0", "policy_step": 0,
        "vocab_fingerprint": "", "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "max_new_tokens": 512, "seed": 0, "on_policy": False,
    }  # fmt: skip
    rows = []
    for number in range(case.rows):
        problem = case.problems[number // case.group]
        lead = f"Response {number}. " + FILLER * draw.randint(8, 14)
        text = lead + case.box.format(case.answer(problem, number))
        ids = {"rollout_id": f"r{number}", "problem_id": problem["problem_id"]}
        own = {"group_id": f"g{problem['problem_id']}", "sample_index": number % case.group}
        rows.append(rollout | ids | own | {"response": text})
    by_id = {problem["problem_id"]: problem for problem in case.problems}
    out = []
    for first in range(0, len(rows), TABLE):
        some = rows[first : first + TABLE]
        asked = {row["problem_id"]: by_id[row["problem_id"]] for row in some}
        out.append((PROBLEMS.table(asked.values()), _with_tokens(ROLLOUTS.table(some))))
    return out


def _with_tokens(rollouts: pa.Table) -> pa.Table:
    """TOKENS token ids a response."""
    place = rollouts.column_names.index("token_ids")
    offsets = pa.array(range(0, (len(rollouts) + 1) * TOKENS, TOKENS), pa.int32())
    ids = pa.array(np.ones(len(rollouts) * TOKENS, np.int32))
    field = rollouts.schema.field(place)
    column = pa.ListArray.from_arrays(offsets, ids).cast(field.type)
    return rollouts.set_column(place, field, column)


def measure(case: Case, every: list[tuple[pa.Table, pa.Table]]) -> Row:
    """every: the case's tables."""
    settings = {"rewards": [case.part], "workers": 1, "recycle_every": 10**9}
    config = VerifyConfig.model_validate(settings)
    made = [(problems, rollouts.select(judged_columns(config))) for problems, rollouts in every]
    taken = []
    for _ in range(ROUNDS):
        verifier = open_verifier(config)
        problems, rollouts = made[-1]
        verifier.verify(problems, rollouts.slice(0, 100))
        cpu, wall = _cpu_seconds(), time.perf_counter()
        right = sum(_right(verifier.verify(*pair)) for pair in made)
        taken.append((_cpu_seconds() - cpu, time.perf_counter() - wall))
        verifier.close()
    seconds, wall_seconds = statistics.median_low(taken)
    return {
        "part": case.name,
        "where": case.where,
        "per_second": case.rows / seconds,
        "rounds_per_second": sorted(case.rows / cpu for cpu, _ in taken),
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "rows": case.rows,
        "right": right,
        "processor": processor_name(),
    }


def _right(verdicts: pa.Table) -> int:
    return sum(value is True for value in verdicts["correct"].to_pylist())


def _cpu_seconds() -> float:
    """Of this process, its living children, and those that it waited for."""
    living = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = [int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 for pid in living]
    return time.process_time() + sum(spent) + ended.ru_utime + ended.ru_stime


def main() -> None:
    logging.disable(logging.CRITICAL)
    shown, cores = console(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    rows, before, made = [], None, []
    for case in cases():
        if before is None or (before.problems, before.answer) != (case.problems, case.answer):
            made = tables(case)
        before = case
        with shown.status(case.name):
            rows.append(measure(case, made))
            write_rows("rewards.json", rows, ("part",))
    os.sched_setaffinity(0, cores)
    table = Table(title="Rows per second of CPU on one core")
    for column in ("part", "where", "rows", "a second", "goal", "by wall time"):
        table.add_column(column, justify="right" if column in ("rows", "a second") else "left")
    for row in rows:
        goal = TARGETS.get(row["where"])
        table.add_row(
            row["part"],
            row["where"],
            f"{row['rows']:,}",
            f"{row['per_second']:,.0f}",
            "" if goal is None else f"{goal:,}",
            f"{row['rows'] / row['wall_seconds']:,.0f}",
        )
    shown.print(table)


if __name__ == "__main__":
    main()
