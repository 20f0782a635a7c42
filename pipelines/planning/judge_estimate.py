"""What the judges of a verify config will be asked and cost (`trace-opd verify --dry-run`).

Called by the command line (cli/stage_plan.py).
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from rich.console import Group

from ...data.store import Draft
from ...schemas.configs import JudgePart
from ...schemas.labels import FinishReason
from ..paid.completion import request_body
from ..paid.keeping import journals, judged_journals
from ..paid.prices import most_prompt_tokens
from ..progress import progress_bar
from ..stages.base import Plan
from ..verifiers.rewards.rubric import correction, grading, load_rubric
from .estimate import LONGEST_ERROR, Asking, Estimate, estimate_table, journalled, key_of, see


def judge_estimates(plan: Plan, draft: Draft) -> dict[str, Estimate]:
    """Of each judge, by its label, over the parts that are not made yet. Counts grades, not rows.

    Sends nothing and writes nothing.
    """
    return {label: _estimate(part, plan, draft) for label, part in plan.config.judges.items()}


def judge_view(found: Estimate, part: JudgePart) -> Group:
    """The estimate for people."""
    return estimate_table(found, part, True, None, "grades")


def _estimate(part: JudgePart, plan: Plan, draft: Draft) -> Estimate:
    out, rubric = Estimate(), load_rubric(part.rubric)
    folders = list(judged_journals(journals(draft)))
    asking = Asking(part, request_body, journalled(folders, part), set(), key_of(part))
    most = most_prompt_tokens({"messages": correction(rubric, part, "", LONGEST_ERROR)})
    with progress_bar("dry run", plan.parts) as progress:
        for number in range(plan.parts):
            for problem, response in () if draft.has_part(number) else _asked(plan, number):
                about = rubric, part, problem, response
                for repeat, order in product(range(part.repeats), part.orders):
                    out.rows += 1
                    see(out, grading(*about, order, repeat), asking, lambda: most)
            progress.advance()
    out.full.prompt = out.prompt_bytes / out.bytes_per_token
    return out


def _asked(plan: Plan, number: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Problem and response of each rollout that judges are asked about: those that ended."""
    rollouts = plan.inputs["rollouts"]
    problems = {
        row["problem_id"]: row for row in rollouts.input("problems").read_part(number).to_pylist()
    }
    columns = ["problem_id", "response", "finish_reason"]
    for row in rollouts.read_part(number, columns).to_pylist():
        if row["finish_reason"] != FinishReason.LENGTH:
            yield problems[row["problem_id"]], row["response"]
