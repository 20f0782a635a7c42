"""Annotation by a model behind any OpenAI-compatible chat endpoint, engine `openai`.

Rows are made here, requests are sent by paid_requests.py. `batch=true` asks through the Batch API
instead (openai_batch.py).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
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
from ..runtime.event_loop import EventLoop
from ..runtime.signals import announce, drained
from . import Engine
from .budget import BudgetSpent
from .claims import Claims
from .completion import is_answer, request_body
from .dialogue import Answer, dialogue
from .journal import Journal
from .pace import AskedToWait, Closed
from .paid_requests import Requests
from .prices import find_price
from .prompting import AnnotationPrompt, load_prompt
from .rows import KEPT, NO_ANSWER, SKIPPED, Identity, Item, Reading, annotation_row, items
from .spending import Spending, open_spending

logger = logging.getLogger(__name__)

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
        self._who = Identity(config.name, config.model, prompt.version)
        self._requests = Requests(config, prompt, journal, spending)
        self._pace = self._requests.pace
        self._calls = self._failures = 0
        self._known = 0  # answers that the journal had
        # One loop for all parts: client and pace belong to the loop in which they are first used.
        self._loop = EventLoop()

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`.

        Raises:
            InputError: more than half of the calls fail, or all must fail; the budget is spent; no
                answer for `patience_s`. Answers that arrived are in the journal.
            Stopped, Interrupted: SIGTERM or Ctrl-C; requests in flight have ended.
        """
        self._calls = self._failures = self._known = 0
        self._requests.reopen()
        work = items(problems, rollouts, verdicts, self._segment)
        name = f"annotator {self._config.name}"
        with drained(lambda: self._loop.soon(self._drain), lambda: f"{name}: stopped; {KEPT}"):
            rows = self._loop.run(self._annotate(work, rollouts.num_rows))
        # The journal's answers count too: of a few rows that are asked again all may fail again.
        stopped = self._requests.stopped is not None
        if not stopped and self._failures * 2 > self._calls + self._known:
            error = next(row["error"] for row in rows if row["error"] is not None)
            self._end_failing(error.removeprefix(NO_ANSWER))
        if (why := self._requests.stopped) is not None:
            raise InputError(f"{name} at {self._config.base_url}: {why}: {KEPT}")
        return ANNOTATIONS.table(rows)

    def close(self) -> None:
        self._loop.run(self._requests.close())
        self._loop.close()
        try:
            self._requests.close_journal()
        finally:
            self._spending.close()

    async def _annotate(self, work: Iterator[Item], number: int) -> list[dict[str, Any]]:
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
                rows[index] = await self._row(item)
        except BudgetSpent as spent:
            price = self._spending.price
            self._requests.stop(
                f"{spent}, at {price}; raise annotator.budget_usd and run again to go on"
            )
        except AskedToWait as asked:
            self._requests.stop(f"it asks to wait {asked}; run again then")
        except Closed:
            return

    async def _row(self, item: Item) -> dict[str, Any]:
        if item.correct is None:
            return annotation_row(item, self._who, SKIPPED, self._spending.row([]))
        talk = dialogue(self._prompt, item, self._config)
        answers: list[Answer] = []
        try:
            question = next(talk)
            while True:
                answer, known = await self._requests.answer(question)
                self._known += known
                self._calls += not known
                answers.append(answer)
                question = talk.send(answer)
        except StopIteration as done:
            reading = done.value
        except endpoint.FAILURES as error:
            reading = self._failed(error)
        raw = answers[-1].text if answers else None
        return annotation_row(item, self._who, reading, self._spending.row(answers), raw)

    def _failed(self, error: Exception) -> Reading:
        text = self._requests.sentence(error)
        self._calls += 1
        self._failures += 1
        often = self._failures >= _FEWEST_FAILURES and self._failures * 2 > self._calls
        if endpoint.condemns_all(error) or often:
            self._end_failing(text)
        logger.warning("%s: %s", self._config.name, text)
        passing = NO_ANSWER if endpoint.may_pass(error) else ""
        return Reading(AnnotationStatus.FAILED, error=f"{passing}{text}")

    def _end_failing(self, text: str) -> None:
        self._requests.stop(
            f"{self._failures} of {self._calls} calls failed ({text}); mend that and run again"
        )


def _identity(config: OpenAIAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    identity = load_prompt(config.prompt, config.answer_schema).sha256
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
    prompt = load_prompt(config.prompt, config.answer_schema)
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
