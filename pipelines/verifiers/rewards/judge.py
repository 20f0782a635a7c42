"""Part `judge`: a model at an endpoint grades the response by a rubric (rubric.py).

Each answer is journalled before it counts, budgeted and paid for once (paid/). A response whose
grades are not all there has no value.
"""

from typing import Any

from ....schemas.configs import JudgePart, VerifyConfig
from ....schemas.labels import Order, VerdictStatus
from ... import endpoint
from ...paid.conversations import Conversations, Failure, Held
from ...paid.dialogue import NoReading
from ...paid.keeping import Kept
from ...paid.prices import find_price
from ...paid.spending import open_spending
from ...progress import count_rows
from .part import Batch, Values
from .rubric import Grade, grading, load_rubric

_Ask = tuple[int, int, Order]  # row, repeat, order


def identity(part: JudgePart) -> str:
    """Raises InputError for every fault that can be found before the first response."""
    rubric = load_rubric(part.rubric)
    endpoint.read_key(part.api_key_env, "judge.api_key_env")
    find_price(part)
    return f"judge 1, {part.model}, {rubric.version} {rubric.sha256[:16]}"


class Judge:
    """Opens its journal with the first response: under several ranks only the first one judges."""

    def __init__(
        self, part: JudgePart, config: VerifyConfig, label: str = "judge", kept: Kept | None = None
    ) -> None:
        """label: of the part; kept: where its answers are kept, None: nowhere."""
        identity(part)
        self._part, self._label, self._kept = part, label, kept
        self._rubric = load_rubric(part.rubric)
        self._conversations: Conversations | None = None

    def judge(self, batch: Batch) -> Values:
        """Raises as `Conversations.hold`."""
        part = self._part
        asks: list[_Ask] = [
            (row, repeat, order)
            for row in range(len(batch.responses))
            for repeat in range(part.repeats)
            for order in part.orders
        ]
        talks = ((ask, self._grading(batch, ask)) for ask in asks)
        held = self._open().hold(talks, len(asks), _count)
        each = part.repeats * len(part.orders)
        rows = [held[start : start + each] for start in range(0, len(held), each)]
        grades = [[_grade(self._label, one) for one in row] for row in rows]
        missing = [
            next((one["status"] for one in row if one["grade"] is None), None) for row in grades
        ]
        return Values(
            [
                sum(one["grade"] for one in row) / (each * part.highest) if lacks is None else None
                for row, lacks in zip(grades, missing, strict=True)
            ],
            [lacks or VerdictStatus.OK for lacks in missing],
            [sum(a.latency_s for one in row for a in one.answers.values()) for row in rows],
            feedback=[
                _reason(row) if lacks is None else None
                for row, lacks in zip(grades, missing, strict=True)
            ],
            grades=grades,
        )

    def close(self) -> None:
        if self._conversations is not None:
            self._conversations.close()
            self._conversations = None

    def _grading(self, batch: Batch, ask: _Ask) -> Any:
        row, repeat, order = ask
        problem, response = batch.problem(row), batch.responses[row]
        return grading(self._rubric, self._part, problem, response, order, repeat)

    def _open(self) -> Conversations:
        if self._conversations is None:
            part, asks = self._part, self._part.repeats * len(self._part.orders)
            journal, spending = None, None
            if self._kept is not None:
                journal, spending = self._kept.open(self._label, part, asks)
            spending = spending or open_spending(part)
            self._conversations = Conversations(part, self._label, journal, spending)
        return self._conversations


def _count(ask: _Ask) -> None:
    """A response counts with its first grade."""
    if ask[1:] == (0, Order.REFERENCE_FIRST):
        count_rows()


def _grade(label: str, held: Held[_Ask, Grade | NoReading]) -> dict[str, Any]:
    """An entry of column `grades`."""
    _, repeat, order = held.about
    entry = {"name": label, "repeat": repeat, "order": order}
    match held.outcome:
        case Grade(grade, reason):
            found = grade, VerdictStatus.OK, reason or None
        case NoReading(refused, error):
            found = None, VerdictStatus.REFUSED if refused else VerdictStatus.INVALID, error
        case Failure(error):
            found = None, VerdictStatus.FAILED, error
        case None:
            raise AssertionError("every response is asked about")
    return entry | dict(zip(("grade", "status", "reason"), found, strict=True))


def _reason(row: list[dict[str, Any]]) -> str | None:
    """The reason of the first grade that is nearest to the mean."""
    mean = sum(one["grade"] for one in row) / len(row)
    return min(row, key=lambda one: abs(one["grade"] - mean))["reason"]
