"""What the stages of a pipeline will cost and take, before any of their inputs may exist.

pipeline_plan.py calls this. A budget below the cost of the prompts alone is a fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import PaidEndpoint
from ...schemas.labels import FinishReason
from ..annotators import engine_of
from ..paid.prices import find_price
from ..paid.spending import dollars
from ..stages.base import Plan
from ..stages.select import asked_rows
from .estimate import Estimate, Tokens, estimate
from .expected import ExpectedDataset
from .faults import annotated_rows
from .judge_estimate import judge_estimates

_SAMPLED = 32  # problems from which a cost is estimated

Cost = tuple[str, list[str], list[str]]  # what a stage takes, faults, notes
_NOTHING: Cost = ("", [], [])


def cost(stage: str, config: Any, plan: Plan, draft: Draft) -> Cost:
    """What a stage's annotator or judges will cost, and whether their budgets suffice."""
    if stage == "verify":
        return _of_judges(config, plan, draft)
    if stage == "annotate":
        annotator, rows = config.annotator, asked_rows(plan.inputs["verdicts"])
    elif stage == "train" and (rows := annotated_rows(config)):
        annotator = config.online.annotator
    else:
        return _NOTHING
    if not engine_of(annotator).asks_endpoint or rows == 0:
        return _NOTHING
    least, full = _tokens(stage, config, plan, draft, rows)
    setting = "annotator.budget_usd" if stage == "annotate" else "online.annotator.budget_usd"
    return _fits(annotator, setting, rows, least, full, "annotate fewer rollouts")


def _fits(
    asked: PaidEndpoint, setting: str, requests: int, least: Tokens, full: Tokens, mend: str
) -> Cost:
    """Whether a budget suffices. mend: what to do besides raising it."""
    price, batched = find_price(asked), getattr(asked, "batch", False)
    costs = least.usd(price, batched), full.usd(price, batched)
    if price is None or costs[0] is None or costs[1] is None:
        return f"{requests} requests, price unknown", [], []
    takes = f"{dollars(costs[0])} – {dollars(costs[1])}"
    budget = asked.budget_usd
    if budget is None or budget >= costs[1]:
        return takes, [], []
    text = f"{setting} is {dollars(budget)}, and {requests} requests take {takes}"
    if budget >= costs[0]:
        return takes, [], [f"{text}: it may not suffice"]
    return takes, [f"{text}; raise it, or {mend}"], []


def _of_judges(config: Any, plan: Plan, draft: Draft) -> Cost:
    rollouts = plan.inputs["rollouts"]
    if not config.judges:
        return _NOTHING
    share = 1.0
    if not isinstance(rollouts, ExpectedDataset):
        estimates = [judge_estimates(plan, draft)] * 2
    else:
        problems = rollouts.input("problems").read_part(0).slice(0, _SAMPLED)
        if problems.num_rows == 0:
            return _NOTHING
        limit = rollouts.manifest["config"].get("sampling", {}).get("max_new_tokens", 0)
        share = rollouts.rows / problems.num_rows
        estimates = [_graded(config, problems, draft, "word " * n) for n in (0, limit)]
    takes, faults, notes = [], [], []
    for label, part in config.judges.items():
        short, long = (found[label] for found in estimates)
        least = short.expected or Tokens(short.full.prompt)
        full = long.full
        one = _fits(
            part, f"{label}.budget_usd", round(long.asked * share),
            Tokens(least.prompt * share, least.completion * share),
            Tokens(full.prompt * share, full.completion * share), "verify fewer rollouts",
        )  # fmt: skip
        takes.append(one[0])
        faults += one[1]
        notes += one[2]
    return ", ".join(takes), faults, notes


def _tokens(stage: str, config: Any, plan: Plan, draft: Draft, rows: int) -> tuple[Tokens, Tokens]:
    """The fewest tokens that the requests take, and those of full answers.

    The fewest: measured on known answers, or prompts alone. Of responses that are not sampled yet
    the fewest are empty, and the others as long as their limit.
    """
    expected = [isinstance(dataset, ExpectedDataset) for dataset in plan.inputs.values()]
    if stage == "annotate" and not any(expected):
        found = estimate(plan, draft)
        assert found is not None, "it asks an endpoint"
        return found.expected or Tokens(found.full.prompt), found.full
    problems = plan.inputs["problems"].read_part(0).slice(0, _SAMPLED)
    if problems.num_rows == 0:
        return Tokens(), Tokens()
    if stage == "annotate":
        sampling = plan.inputs["rollouts"].manifest["config"].get("sampling", {})
        limit = sampling.get("max_new_tokens", 0)
    else:
        config, limit = config.online, config.online.sampling.max_new_tokens
    short, long = (_sampled(config, problems, draft, "word " * n) for n in (0, limit))
    share = rows / problems.num_rows
    return (
        Tokens(short.full.prompt * share),
        Tokens(long.full.prompt * share, long.full.completion * share),
    )


@dataclass(frozen=True)
class _Table:
    """A table in place of a dataset of one part."""

    table: pa.Table

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table


def _sampled(config: Any, problems: pa.Table, draft: Draft, response: str) -> Estimate:
    """The estimate of one wrong response to each problem."""
    ids, count = problems["problem_id"].combine_chunks(), problems.num_rows
    shared: dict[str, Any] = {"rollout_id": ids, "problem_id": ids, "group_id": ids}
    tables = {
        "problems": problems,
        "rollouts": pa.table(shared | {"response": pa.array([response] * count)}),
        "verdicts": pa.table(shared | {"correct": pa.array([False] * count)}),
    }
    inputs: Any = {role: _Table(table) for role, table in tables.items()}
    unmade = replace(draft, id="0")  # no part of it is there
    found = estimate(Plan(config, inputs, {}, 1), unmade)
    assert found is not None, "it asks an endpoint"
    return found


@dataclass(frozen=True)
class _Rollouts(_Table):
    """One response to each problem, in place of a rollouts dataset."""

    problems: _Table

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table.select(list(columns)) if columns else self.table

    def input(self, role: str) -> _Table:
        return self.problems


def _graded(config: Any, problems: pa.Table, draft: Draft, response: str) -> dict[str, Estimate]:
    """The judges' estimates for one response to each problem; each response is another one."""
    count = problems.num_rows
    rollouts = pa.table(
        {
            "problem_id": problems["problem_id"].combine_chunks(),
            "response": pa.array([f"{response}{number}" for number in range(count)]),
            "finish_reason": pa.array([FinishReason.STOP.value] * count),
        }
    )
    inputs: Any = {"rollouts": _Rollouts(rollouts, _Table(problems))}
    return judge_estimates(Plan(config, inputs, {}, 1), replace(draft, id="0"))


def past_seconds(stage: str, config: Any, store: Store, rows: int | None) -> str:
    """About how long a stage takes, by the newest dataset of the same stage and policy."""
    steps = config.offline.steps + config.online.steps if stage == "train" else 0

    def alike(dataset: Dataset) -> bool:
        recorded = dataset.manifest["config"]
        if isinstance(recorded.get("online"), str):  # a table of a training's steps
            return False
        for section, key in (("policy", "path"), ("annotator", "engine")):
            own, other = getattr(config, section, None), recorded.get(section) or {}
            if own is not None and other.get(key) != getattr(own, key):
                return False
        return True

    made = filter(alike, store.datasets(stage))
    for past in sorted(made, key=lambda one: one.manifest["finished_at"], reverse=True):
        amount, before = (steps, past.summary.get("steps")) if steps else (rows, past.rows)
        if amount and before:
            seconds = past.manifest["seconds"] * amount / before
            return f"about {seconds:.0f} s, as {past.ref}"
    return ""
