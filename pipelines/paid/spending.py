"""What the answers of one dataset cost: price, budget and running totals, for all engines.

async with spending.reserve(body) as reservation:   # before sending; waits, or BudgetSpent
    answer = …
    reservation.settle(spending.cost_usd([answer]))
spending.row(answers)                                # when a row is done: counted and shown
usage = spending.charge(rollout_id, answers)         # the row's own share, in the table's order

Rows with the same question share its answer, which is paid and counted once: the first row of the
dataset bears its tokens, time and cost, the others have 0.

Called by the annotate stage, which opens it, and by the engines that it is passed to.
"""

import fcntl
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from ...schemas.configs import PaidEndpoint
from ...schemas.errors import InputError
from .bill import read_bill
from .budget import Budget, Reservation
from .prices import Price, find_price
from .questions import Answer, Usage, usage

logger = logging.getLogger(__name__)

Answers = Mapping[str, Answer]  # of one row, by the key of the question

_FEWEST_ROWS = 10  # before the mean cost of a row predicts that of the next ones


class Spending:
    """Shared by all parts of a dataset in a process; any thread may use it.

    price: None if unknown. rows: of the dataset, None if unknown. tell: shows figures, given by
    name, while the stage runs. lock: held until `close`.
    """

    def __init__(
        self,
        price: Price | None = None,
        budget: Budget | None = None,
        rows: int | None = None,
        tell: Callable[..., None] | None = None,
        lock: IO[bytes] | None = None,
    ) -> None:
        self.price, self.budget = price, budget
        self._rows, self._tell, self._file = rows, tell, lock
        self._done = 0
        self._total = Usage()
        self._borne: dict[str, str] = {}  # by question: the row that bears the answer's cost
        self._shown: set[str] = set()  # questions whose answers the totals have
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def cost_usd(self, answers: Sequence[Answer]) -> float | None:
        """What answers cost, None if price or tokens are unknown."""
        return None if self.price is None else self.price.cost_usd(answers)

    @asynccontextmanager
    async def reserve(self, body: dict[str, Any]) -> AsyncIterator[Reservation]:
        """Set aside what a request may cost. Without a budget there is room for any.

        Raises:
            BudgetSpent: there is no room.
        """
        if self.budget is None or self.price is None:
            yield Reservation(0.0)
            return
        async with self.budget.reserve(self.price.worst_case_usd(body)) as reservation:
            yield reservation

    def row(self, answers: Answers) -> None:
        """Count a row that is done, with its answers that no other row has, and show the totals."""
        with self._lock:
            fresh = [answer for key, answer in answers.items() if key not in self._shown]
            self._shown.update(answers)
        self.count(1, self._usage(fresh))

    def charge(self, rollout_id: str, answers: Answers) -> Usage:
        """What a row bears of its answers. To be called for all rows in the dataset's order; a row
        that is made again bears the same."""
        return self._usage(
            [
                answer
                for key, answer in answers.items()
                if self._borne.setdefault(key, rollout_id) == rollout_id
            ]
        )

    def made(self, rollout_id: str, answers: Answers) -> None:
        """Note a row of a part that an earlier run made, whose figures are counted already."""
        self._shown.update(answers)
        self.charge(rollout_id, answers)

    def unanswered(self, reason: str) -> None:
        """Count a request without an answer; the next totals show it."""
        with self._lock:
            self._failures[reason] += 1

    def named(self) -> str:
        """How many requests of this process have no answer, by reason; empty if all have one."""
        return ", ".join(f"{number} {reason}" for reason, number in self._failures.items())

    def _usage(self, answers: Sequence[Answer]) -> Usage:
        return usage(answers, self.cost_usd(answers) if answers else 0.0)

    def count(self, rows: int, usage: Usage) -> None:
        """Count rows that are done with their usage together, and show the totals."""
        with self._lock:
            self._done += rows
            self._total = plus(self._total, usage)
            figures = self.figures()
        self.tell(**figures)

    def tell(self, **figures: object) -> None:
        """Show figures while the stage runs."""
        if self._tell is not None:
            self._tell(**figures)

    def figures(self) -> dict[str, str]:
        """Rows, tokens and US dollars so far, those of earlier runs included."""
        total, rows = self._total, self._rows
        out = {
            "rows": f"{self._done}" if rows is None else f"{self._done}/{rows}",
            "tokens": f"{count(total.prompt_tokens)}+{count(total.completion_tokens)}",
            "cost": dollars(total.cost_usd),
        }
        if rows is not None and total.cost_usd is not None and _FEWEST_ROWS <= self._done < rows:
            out["of about"] = dollars(total.cost_usd / self._done * rows)
        if self.budget is not None:
            out["budget"] = dollars(self.budget.limit_usd)
            if self.budget.possibly_usd:
                out["possibly billed"] = dollars(self.budget.possibly_usd)
        return out | {reason: str(number) for reason, number in self._failures.items()}

    def close(self) -> None:
        """Release the lock on the budget."""
        if self._file is not None:
            self._file.close()
            self._file = None


def open_spending(
    config: PaidEndpoint,
    journal: Path | None = None,
    rows: int | None = None,
    tell: Callable[..., None] | None = None,
) -> Spending:
    """Price and budget of a config.

    journal: the folder of a dataset's paid answers, which count as spent, as do requests that may
    have been billed.

    Raises:
        InputError: a budget without a known price, another process that spends the same budget, an
            answer of unknown cost, a bad file of prices.
    """
    price = find_price(config)
    logger.info("price of %s: %s", config.model, price or "unknown")
    if config.budget_usd is None or price is None:
        return Spending(price, rows=rows, tell=tell)
    if journal is None:
        return Spending(price, Budget(config.budget_usd), rows, tell)
    lock = exclusive(journal / "budget.lock", f"spends this dataset's {config.role}.budget_usd")
    try:
        bill = read_bill(journal, price, f"{config.role}.budget_usd")
        budget = Budget(config.budget_usd, bill.spent_usd or 0.0, bill.possibly_usd or 0.0)
    except BaseException:
        lock.close()
        raise
    return Spending(price, budget, rows, tell, lock)


def exclusive(path: Path, what: str) -> IO[bytes]:
    """A lock of one process, until it is closed or the process ends.

    what: what its holder does, for the error.

    Raises:
        InputError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"{path}: another process {what}; wait for it, or run all parts in one process "
            "(TRACE_OPD_TASK_RUNNER=threads)"
        ) from None
    return file


def plus(one: Usage, other: Usage) -> Usage:
    """The sum of two usages. One unknown makes a sum unknown, never too low."""

    def add(a: Any, b: Any) -> Any:
        return None if a is None or b is None else a + b

    return Usage(
        add(one.prompt_tokens, other.prompt_tokens),
        add(one.completion_tokens, other.completion_tokens),
        add(one.cost_usd, other.cost_usd),
        one.latency_s + other.latency_s,
    )


def dollars(usd: float | None) -> str:
    """US dollars for people. An unknown cost is "unknown", never 0."""
    if usd is None:
        return "unknown"
    decimals = 2 if usd >= 10 or usd == 0 else 4 if usd >= 0.01 else 6
    return f"${usd:,.{decimals}f}"


def count(tokens: float | None) -> str:
    """A number of tokens for people."""
    if tokens is None:
        return "unknown"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return f"{tokens:.0f}"
