"""What the annotation of one dataset costs: price, budget and running totals, for all engines.

async with spending.reserve(body) as reservation:   # before sending; waits, or BudgetSpent
    answer = …
    reservation.settle(spending.cost_usd([answer]))
usage = spending.row(answers)                        # when a row is done: counted and shown

Called by the annotate stage, which opens it, and by the engines that it is passed to.
"""

import fcntl
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from ...schemas.configs import OpenAIAnnotator
from ...schemas.errors import InputError
from ..progress import count_rows
from .budget import Budget, Reservation
from .completion import is_answer, read_record
from .dialogue import Answer, usage
from .journal_lines import Answered, Reserved, Settled, journal_files, read_lines
from .prices import Price, find_price
from .rows import Usage

logger = logging.getLogger(__name__)

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

    def row(self, answers: Sequence[Answer]) -> Usage:
        """Count a row that is done, with all its answers, and show the totals."""
        out = usage(answers, self.cost_usd(answers) if answers else 0.0)
        self.count(1, out)
        count_rows()
        return out

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
        return out

    def close(self) -> None:
        """Release the lock on the budget."""
        if self._file is not None:
            self._file.close()
            self._file = None


def open_spending(
    config: OpenAIAnnotator,
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
    lock = exclusive(journal / "budget.lock", "spends this dataset's annotator.budget_usd")
    try:
        budget = Budget(config.budget_usd, _spent_usd(journal, price))
    except BaseException:
        lock.close()
        raise
    return Spending(price, budget, rows, tell, lock)


def _spent_usd(journal: Path, price: Price) -> float:
    """What a journal's requests cost: its answers, and what was reserved and never settled.

    An answer that was paid for twice is there twice.

    Raises:
        InputError: an answer of which neither cost nor worst case is known.
    """
    answers_usd, reserved, settled = 0.0, dict[str, float](), set[str]()
    for entry in journal_files(journal):
        for _, _, line in read_lines(Path(entry.path)):
            match line:
                case Reserved(name, usd):
                    reserved[name] = usd
                case Settled(name):
                    settled.add(name)
                case Answered(_, record) if is_answer(record):
                    usd = price.billed_usd(read_record(record))
                    if usd is None:
                        raise InputError(
                            f"{entry.path}: holds an answer whose tokens the endpoint did not "
                            "tell, "
                            "so what has been spent is unknown; leave annotator.budget_usd out"
                        )
                    answers_usd += usd
    return answers_usd + sum(usd for name, usd in reserved.items() if name not in settled)


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
