"""Stage verify: each response's final answer against the gold answer, one verdict per rollout.

    trace-opd verify configs/verify.yaml rollouts=<dataset>

The registry loads its `STAGE`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import VerifyConfig
from ...schemas.errors import InputError, TooManyFailed
from ...schemas.labels import VerdictStatus
from ...schemas.tables import ROLLOUTS, VERDICTS
from ..verifiers.grades import summarize_grades
from ..verifiers.registry import (
    judged_columns,
    judges_bills,
    keep_answers,
    open_verifier,
    verifier_identity,
)
from .base import PartMaker, Plan, Stage

_SUMMARIZED = ("status", "correct", "seconds", "parts", "grades")


def _resolve(config: VerifyConfig, store: Store) -> Plan:
    rollouts = store.get(config.rollouts, ROLLOUTS)
    problems = rollouts.input("problems")
    if rollouts.parts != problems.parts:
        raise InputError(
            f"dataset {rollouts.ref} has {rollouts.parts} parts, its problems {problems.ref} have "
            f"{problems.parts}; run rollout again"
        )
    semantic = config.semantic()
    del semantic["rollouts"]  # the dataset's id stands for it
    semantic["verifiers"] = verifier_identity(config)
    if config.judges:
        store.files.local_root()  # for their journals
    inputs = {"rollouts": rollouts}
    return Plan(config, inputs, semantic, rollouts.parts, work=rollouts.part_rows)


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    rollouts = plan.inputs["rollouts"]
    problems = rollouts.input("problems")
    columns = judged_columns(plan.config)
    kept = keep_answers(plan.config, draft, rollouts.rows)
    with closing(open_verifier(plan.config, kept)) as verifier:
        yield lambda part: verifier.verify(
            problems.read_part(part), rollouts.read_part(part, columns)
        )


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Rows per status, pass rate over the rows with a reward, mean seconds per row; of each part of
    `verify.rewards` the mean value and the rows without one, of each judge how its grades agree.
    """
    statuses: Counter[str] = Counter()
    parts: dict[str, list[float | None]] = {}
    grades: list[list[dict[str, Any]]] = []
    rows, scored, right, seconds = 0, 0, 0, 0.0
    for table in tables:
        names = [name for name in _SUMMARIZED if name in table.column_names]
        for row in table.select(names).to_pylist():
            for part in row.get("parts") or []:
                parts.setdefault(part["name"], []).append(part["value"])
            grades.append(row.get("grades") or [])
            statuses[row["status"]] += 1
            rows += 1
            scored += row["correct"] is not None
            right += row["correct"] is True
            seconds += row["seconds"]
    means = {name: _mean(values) for name, values in parts.items()}
    given = summarize_grades(grades, plan.config.judges)
    return {
        "statuses": dict(sorted(statuses.items())),
        "scored": scored,
        "pass_rate": right / scored if scored else None,
        "mean_seconds": seconds / rows if rows else None,
    } | {name: found for name, found in (("parts", means), ("grades", given)) if found}


def _mean(values: list[float | None]) -> dict[str, Any]:
    held = [value for value in values if value is not None]
    return {
        "mean": sum(held) / len(held) if held else None,
        "without_value": len(values) - len(held),
    }


def _check(config: VerifyConfig, dataset: Dataset) -> None:
    """Raises TooManyFailed if no response could be judged."""
    statuses = dataset.summary["statuses"]
    if dataset.summary["scored"] or not statuses or set(statuses) == {VerdictStatus.TRUNCATED}:
        return
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    raise TooManyFailed(
        f"{dataset.ref} is finished, but none of its {dataset.rows} responses could be judged "
        f"({counts}); mend the gold answers, the reward or the limits of verify, and run it again"
    )


STAGE = Stage(
    "verify",
    VerifyConfig,
    VERDICTS,
    _resolve,
    _open,
    _summarize,
    None,  # parts is an optional column
    check=_check,
    measure=lambda plan, draft: judges_bills(plan.config, draft),
    one_process=lambda config: bool(config.judges),
)
