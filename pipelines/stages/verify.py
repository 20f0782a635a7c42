"""Stage verify: each response's final answer against the gold answer, one verdict per rollout.

trace-opd verify configs/verify.yaml rollouts=<dataset>
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ...data.store import Draft, Store
from ...schemas.configs import VerifyConfig
from ...schemas.errors import InputError
from ...schemas.tables import ROLLOUTS, VERDICTS
from ..verifiers.verdicts import CHOICE_MATCHER, JUDGED_COLUMNS, MathVerifier, math_matcher
from .base import Plan, Stage


def _resolve(config: VerifyConfig, store: Store) -> Plan:
    rollouts = store.get(config.rollouts, ROLLOUTS)
    problems = rollouts.input("problems")
    if rollouts.parts != problems.parts:
        raise InputError(
            f"dataset {rollouts.ref} has {rollouts.parts} parts, its problems {problems.ref} have "
            f"{problems.parts}; run rollout again"
        )
    semantic = config.semantic()
    # Its id is among the inputs: the name that it was asked for by makes no other dataset.
    del semantic["rollouts"]
    semantic["verifiers"] = [math_matcher(), CHOICE_MATCHER]
    return Plan(config, {"rollouts": rollouts}, semantic, rollouts.parts)


class _VerdictParts:
    """Part i of the verdicts from part i of the rollouts and of their problems."""

    def __init__(self, plan: Plan, draft: Draft) -> None:
        self._rollouts = plan.inputs["rollouts"]
        self._problems = self._rollouts.input("problems")
        self._verifier = MathVerifier(plan.config)

    def __call__(self, part: int) -> pa.Table:
        return self._verifier.verify(
            self._problems.read_part(part), self._rollouts.read_part(part, JUDGED_COLUMNS)
        )

    def close(self) -> None:
        self._verifier.close()


def summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Rows per status, pass rate over the rows with a reward, mean seconds per row."""
    statuses: Counter[str] = Counter()
    rows, scored, right, seconds = 0, 0, 0, 0.0
    for table in tables:
        for row in table.select(["status", "correct", "seconds"]).to_pylist():
            statuses[row["status"]] += 1
            rows += 1
            scored += row["correct"] is not None
            right += row["correct"] is True
            seconds += row["seconds"]
    return {
        "statuses": dict(sorted(statuses.items())),
        "scored": scored,
        "pass_rate": right / scored if scored else None,
        "mean_seconds": seconds / rows if rows else None,
    }


STAGE = Stage(
    name="verify",
    config_type=VerifyConfig,
    contract=VERDICTS,
    resolve=_resolve,
    open=_VerdictParts,
    summarize=summarize,
)
