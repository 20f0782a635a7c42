"""Annotation by a model behind any OpenAI-compatible chat endpoint, engine `openai`.

Rows are made here, requests are sent by paid/requests.py. `batch=true` asks through the Batch API
instead (openai_batch.py).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...data.store import Dataset
from ...schemas.configs import OpenAIAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS
from ...trace.protocols import Annotator
from .. import endpoint
from ..paid.budget import BudgetSpent
from ..paid.claims import Claims
from ..paid.completion import is_answer, request_body
from ..paid.journal import Journal
from ..paid.pace import AskedToWait, Closed
from ..paid.prices import find_price
from ..paid.questions import Answer, Question
from ..paid.requests import Requests
from ..paid.spending import Spending, open_spending
from ..runtime.event_loop import EventLoop
from ..runtime.signals import announce, drained
from . import Engine
from .dialogue import dialogue, replay
from .prompting import AnnotationPrompt, prompt_of
from .rows import KEPT, NO_ANSWER, SKIPPED, Identity, Item, Reading, annotation_row, items

logger = logging.getLogger(__name__)

_Done = tuple[Item, Reading, dict[str, Answer]]  # a row: its answers by question

_FEWEST_FAILURES = 10  # before the share of failed calls means something within a part


class EndpointAnnotator:
    """Annotates over HTTP. Client, pace and counts live as long as the annotator does."""

    def __init__(
        self,
        config: OpenAIAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        journal: Journal | None,
        spending: Spending,
    ) -> None:
        self._config, self._prompt, self._segment = config, prompt, segment
        self._spending = spending
        self._who = Identity(config.name, config.model, prompt.version, prompt.reflection)
        self._requests = Requests(config, journal, spending)
        self._pace = self._requests.pace
        # Of a part, by the key of the question: rows that share one count once.
        self._known: set[str] = set()  # the journal had the answer
        self._called: set[str] = set()
        self._failures: set[str] = set()
        # One loop for all parts: client and pace belong to the loop in which they are first used.
        self._loop = EventLoop()

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`.

        Raises:
            InputError: more than half of the calls fail, or all must fail; the budget is spent; no
                answer for `patience_s`. Answers that arrived are in the journal.
            Stopped, Interrupted: SIGTERM or Ctrl-C; requests in flight have ended.
        """
        self._known, self._called, self._failures = set(), set(), set()
        self._requests.reopen()
        work = items(problems, rollouts, verdicts, self._segment)
        name = f"annotator {self._config.name}"
        with drained(lambda: self._loop.soon(self._drain), lambda: f"{name}: stopped; {KEPT}"):
            made = self._loop.run(self._annotate(work, rollouts.num_rows))
        # The journal's answers count too: of a few rows that are asked again all may fail again.
        stopped = self._requests.stopped is not None
        if not stopped and len(self._failures) * 2 > len(self._called | self._known):
            error = next(reading.error for _, reading, _ in made if reading.error is not None)
            self._end_failing(error.removeprefix(NO_ANSWER))
        if (why := self._requests.stopped) is not None:
            unanswered = self._spending.named()
            counted = f" (requests without an answer: {unanswered})" if unanswered else ""
            raise InputError(f"{name} at {self._config.base_url}: {why}{counted}: {KEPT}")
        return ANNOTATIONS.table(self._row(*done) for done in made)

    def recall(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
        """Note rows of an earlier run that bear their answers' cost: later rows share them free."""
        for item in items(problems, rollouts, verdicts, self._segment):
            if item.correct is not None:
                answers: dict[str, Answer] = {}
                replay(self._prompt, item, self._config, partial(self._recalled, answers))
                self._spending.made(item.rollout_id, answers)

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

    async def _annotate(self, work: Iterator[Item], number: int) -> list[_Done]:
        rows: list[Any] = [None] * number
        queue = enumerate(work)
        # A worker asks again once its answer is on the disk, so a kill loses one answer per worker
        # at most.
        count = min(self._config.concurrency, number)
        workers = [asyncio.create_task(self._work(queue, rows)) for _ in range(count)]
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
        return rows

    def _drain(self) -> None:
        """Send nothing new. A request in flight ends within `timeout_s`."""
        if not self._pace.closed:
            waiting = f"waiting for {self._pace.in_flight} answers, Ctrl-C again to leave them"
            announce(f"{self._config.name}: {waiting}")
        self._pace.close()

    async def _work(self, queue: Iterator[tuple[int, Item]], rows: list[Any]) -> None:
        try:
            for index, item in queue:
                if self._pace.closed:
                    return
                rows[index] = item, *await self._ask(item)
        except BudgetSpent as spent:
            price = self._spending.price
            self._requests.stop(
                f"{spent}, at {price}; raise annotator.budget_usd and run again to go on"
            )
        except AskedToWait as asked:
            self._requests.stop(f"it asks to wait {asked}; run again then")
        except Closed:
            return

    async def _ask(self, item: Item) -> tuple[Reading, dict[str, Answer]]:
        """What the annotator answers about a row: its reading, and the answers by question."""
        answers: dict[str, Answer] = {}
        reading, key = SKIPPED, ""
        try:
            if item.correct is not None:
                talk = dialogue(self._prompt, item, self._config)
                question = next(talk)
                while True:
                    key = self._requests.key(question)
                    answers[key], known = await self._requests.answer(key, question)
                    (self._known if known else self._called).add(key)
                    question = talk.send(answers[key])
        except StopIteration as done:
            reading = done.value
        except endpoint.FAILURES as error:
            reading = self._failed(key, error)
        self._spending.row(answers)
        return reading, answers

    def _row(self, item: Item, reading: Reading, answers: dict[str, Answer]) -> dict[str, Any]:
        raw = list(answers.values())[-1].text if answers else None
        used = self._spending.charge(item.rollout_id, answers)
        return annotation_row(item, self._who, reading, used, raw)

    def _failed(self, key: str, error: Exception) -> Reading:
        text = self._requests.sentence(error)
        if key not in self._failures:
            self._called.add(key)
            self._failures.add(key)
            failures = len(self._failures)
            often = failures >= _FEWEST_FAILURES and failures * 2 > len(self._called)
            if endpoint.condemns_all(error) or often:
                self._end_failing(text)
            logger.warning("%s at %s: %s", self._config.name, self._config.base_url, text)
        passing = NO_ANSWER if endpoint.may_pass(error) else ""
        return Reading(AnnotationStatus.FAILED, error=f"{passing}{text}")

    def _end_failing(self, text: str) -> None:
        self._requests.stop(
            f"{len(self._failures)} of {len(self._called)} calls failed ({text}); mend that and "
            "run again"
        )


def _identity(config: OpenAIAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    identity = prompt_of(config).sha256
    endpoint.read_key(config.api_key_env, "annotator.api_key_env")
    find_price(config)
    if in_training and config.batch:
        raise InputError(
            "online.annotator.batch is true, and a step would wait a day for its answers; set "
            "it to false"
        )
    return dict(identity)


def _open(
    config: OpenAIAnnotator,
    segment: SegmentConfig,
    *,
    journal: Path | None = None,
    elsewhere: Callable[[], Iterable[Path]] = lambda: (),
    claims: Path | None = None,
    spending: Spending | None = None,
    **batch: Any,
) -> Annotator:
    prompt = prompt_of(config)
    kept = None
    if journal is not None:
        shared = Claims(claims) if claims is not None else None
        kept = Journal(journal, elsewhere, is_answer, shared)
    spending = spending or open_spending(config, journal)
    if not config.batch:
        return EndpointAnnotator(config, prompt, segment, kept, spending)
    from .openai_batch import BatchAnnotator

    assert kept is not None, "batches are journalled"
    return BatchAnnotator(config, prompt, segment, kept, spending, batch["batches"], batch["parts"])


ENGINE = Engine(_identity, _open, asks_endpoint=True, request_body=request_body)
