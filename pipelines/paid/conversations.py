"""Many conversations with one endpoint at once, until all are held or it makes no sense to go on.

Requests are sent by requests.py. Called by the engine `openai` and by the reward `judge`, which
make rows of what was read.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ...schemas.configs import PaidEndpoint
from ...schemas.errors import InputError
from .. import endpoint
from ..runtime.event_loop import EventLoop
from ..runtime.signals import announce, drained
from .budget import BudgetSpent
from .dialogue import replay
from .journal import Journal
from .pace import AskedToWait, Closed
from .questions import Answer, Dialogue, Question
from .requests import Requests
from .spending import Spending

logger = logging.getLogger(__name__)

KEPT = "answers that arrived are kept and not paid again"
_FEWEST_FAILURES = 10  # before the share of failed calls means something within a part

K = TypeVar("K")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """A call that never succeeded. passing: another attempt may succeed."""

    error: str
    passing: bool


@dataclass(frozen=True)
class Held(Generic[K, R]):
    """A conversation that has ended.

    about: what it is about; outcome: what was read, None if nothing was asked; answers: by the key
    of the question.
    """

    about: K
    outcome: R | Failure | None
    answers: dict[str, Answer]


class Conversations:
    """Client, pace and counts live until `close`."""

    def __init__(
        self, config: PaidEndpoint, name: str, journal: Journal | None, spending: Spending
    ) -> None:
        """name: who is asked, for messages."""
        self._config, self._name, self._spending = config, name, spending
        self._requests = Requests(config, journal, spending)
        self._pace = self._requests.pace
        # Of a part, by the key of the question: conversations that share one count once.
        self._known: set[str] = set()  # the journal had the answer
        self._called: set[str] = set()
        self._failures: set[str] = set()
        # One loop for all parts: client and pace belong to the loop in which they are first used.
        self._loop = EventLoop()

    def hold(
        self,
        talks: Iterator[tuple[K, Dialogue[R] | None]],
        number: int,
        done: Callable[[K], None] = lambda about: None,
    ) -> list[Held[K, R]]:
        """Hold a part's conversations, in order.

        talks: what each is about, and its dialogue; None: nothing is asked. They are taken when
        there is room to ask. number: how many there are. done: called when one has ended.

        Raises:
            InputError: more than half of the calls fail, or all must fail; the budget is spent; no
                answer for `patience_s`. Answers that arrived are in the journal.
            Stopped, Interrupted: SIGTERM or Ctrl-C; requests in flight have ended.
        """
        self._known, self._called, self._failures = set(), set(), set()
        self._requests.reopen()
        stopped = lambda: f"{self._name}: stopped; {KEPT}"  # noqa: E731 - a text for later
        with drained(lambda: self._loop.soon(self._drain), stopped):
            made = self._loop.run(self._hold(talks, number, done))
        # The journal's answers count too: of a few rows that are asked again all may fail again.
        ended = self._requests.stopped is not None
        if not ended and len(self._failures) * 2 > len(self._called | self._known):
            outcomes = (one.outcome for one in made)
            self._end_failing(next(o.error for o in outcomes if isinstance(o, Failure)))
        if (why := self._requests.stopped) is not None:
            unanswered = self._spending.named()
            counted = f" (requests without an answer: {unanswered})" if unanswered else ""
            where = f"{self._name} at {self._config.base_url}"
            raise InputError(f"{where}: {why}{counted}: {KEPT}")
        return made

    def recall(self, row_id: str, talk: Dialogue[Any]) -> None:
        """Note a row of an earlier run that bears its answers' cost: later rows share them free."""
        answers: dict[str, Answer] = {}
        replay(talk, partial(self._recalled, answers))
        self._spending.made(row_id, answers)

    def _recalled(self, answers: dict[str, Answer], question: Question) -> Answer | None:
        key = self._requests.key(question)
        if (answer := self._requests.journalled(key)) is not None:
            answers[key] = answer
        return answer

    def close(self) -> None:
        self._loop.run(self._requests.close())
        self._loop.close()
        try:
            self._requests.close_journal()
        finally:
            self._spending.close()

    async def _hold(
        self, talks: Iterator[tuple[K, Dialogue[R] | None]], number: int, done: Callable[[K], None]
    ) -> list[Held[K, R]]:
        held: list[Any] = [None] * number
        queue = enumerate(talks)
        # A worker asks again once its answer is on the disk, so a kill loses one answer per worker
        # at most.
        count = min(self._config.concurrency, number)
        workers = [asyncio.create_task(self._work(queue, held, done)) for _ in range(count)]
        try:
            await asyncio.gather(*map(asyncio.shield, workers))
        except asyncio.CancelledError:  # a second signal
            for worker in workers:
                worker.cancel()
            raise
        except BaseException:  # requests in flight are paid for and end first
            self._drain()
            await asyncio.gather(*workers, return_exceptions=True)
            raise
        return held

    def _drain(self) -> None:
        """Send nothing new. A request in flight ends within `timeout_s`."""
        if not self._pace.closed:
            waiting = f"waiting for {self._pace.in_flight} answers, Ctrl-C again to leave them"
            announce(f"{self._name}: {waiting}")
        self._pace.close()

    async def _work(
        self,
        queue: Iterator[tuple[int, tuple[K, Dialogue[R] | None]]],
        held: list[Any],
        done: Callable[[K], None],
    ) -> None:
        try:
            for index, (about, talk) in queue:
                if self._pace.closed:
                    return
                held[index] = Held(about, *await self._ask(talk))
                done(about)
        except BudgetSpent as spent:
            price, role = self._spending.price, self._config.role
            self._requests.stop(
                f"{spent}, at {price}; raise {role}.budget_usd and run again to go on"
            )
        except AskedToWait as asked:
            self._requests.stop(f"it asks to wait {asked}; run again then")
        except Closed:
            return

    async def _ask(self, talk: Dialogue[R] | None) -> tuple[R | Failure | None, dict[str, Answer]]:
        """What was read, and the answers by question."""
        answers: dict[str, Answer] = {}
        outcome: Any = None
        key = ""
        try:
            if talk is not None:
                question = next(talk)
                while True:
                    key = self._requests.key(question)
                    answers[key], known = await self._requests.answer(key, question)
                    (self._known if known else self._called).add(key)
                    question = talk.send(answers[key])
        except StopIteration as done:
            outcome = done.value
        except endpoint.FAILURES as error:
            outcome = self._failed(key, error)
        self._spending.row(answers)
        return outcome, answers

    def _failed(self, key: str, error: Exception) -> Failure:
        text = self._requests.sentence(error)
        if key not in self._failures:
            self._called.add(key)
            self._failures.add(key)
            failures = len(self._failures)
            often = failures >= _FEWEST_FAILURES and failures * 2 > len(self._called)
            if endpoint.condemns_all(error) or often:
                self._end_failing(text)
            logger.warning("%s at %s: %s", self._name, self._config.base_url, text)
        return Failure(text, endpoint.may_pass(error))

    def _end_failing(self, text: str) -> None:
        self._requests.stop(
            f"{len(self._failures)} of {len(self._called)} calls failed ({text}); mend that and "
            "run again"
        )
