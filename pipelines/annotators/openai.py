"""Annotation by a model behind any OpenAI-compatible chat endpoint: a strong API or an own server.

Retries are our own: the client's would also repeat an exhausted quota. What is paid for is in the
journal before it counts, so a stage that stops or is killed goes on without paying twice.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pyarrow as pa
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
)

from ...schemas.configs import OpenAIAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS
from .. import endpoint, transport
from .budget import BudgetSpent, Reservation
from .completion import bounded, checked_body, question_key, read_record, request_body
from .dialogue import Answer, Question, dialogue
from .drain import drained
from .journal import GroupCommit, Journal, Record
from .pace import AskedToWait, Closed, Pace
from .prices import find_price, most_tokens
from .prompting import AnnotationPrompt
from .rows import NO_ANSWER, SKIPPED, Identity, Item, Reading, annotation_row, items
from .spending import Spending

logger = logging.getLogger(__name__)

_FEWEST_FAILURES = 10  # before the share of failed calls means something within a part
# For each request a pool looks at all of its connections: several small pools take half the time of
# one with 64 connections.
_CONNECTIONS_PER_POOL, _MOST_POOLS = 8, 16
_BYTES_PER_TOKEN = 4  # of English prose; what a prompt really takes is settled with the answer


class EndpointAnnotator:
    """Annotates over HTTP. Client, pace and counts live as long as the annotator does."""

    def __init__(
        self,
        config: OpenAIAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        journal: Journal | None,
        spending: Spending | None = None,
    ) -> None:
        self._config, self._prompt, self._segment = config, prompt, segment
        self._journal = journal
        self._commit = GroupCommit(journal) if journal is not None else None
        self._spending = spending or Spending(find_price(config))
        self._key = endpoint.read_key(config.api_key_env, "annotator.api_key_env")
        self._who = Identity(config.name, config.model, prompt.version)
        self._refused: frozenset[str] = frozenset()
        self._asking: dict[str, asyncio.Task[Record]] = {}
        self._calls = self._failures = 0
        self._known = 0  # answers that the journal had
        self._stop: str | None = None
        # One loop for all parts: client and pace belong to the loop in which they are first used.
        self._runner = asyncio.Runner()
        self._pace = Pace(
            config.concurrency,
            config.requests_per_minute,
            config.tokens_per_minute,
            config.patience_s,
        )
        pools = min(_MOST_POOLS, math.ceil(config.concurrency / _CONNECTIONS_PER_POOL))
        self._clients = [self._new_client() for _ in range(pools)]
        self._turns = itertools.cycle(self._clients)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`. Not to be called from a running event loop: it runs its own.

        Raises:
            InputError: more than half of the calls fail, or all of them must; the budget is spent;
                the endpoint answers nobody for long.
            Stopped, KeyboardInterrupt: SIGTERM or Ctrl-C; requests in flight have ended.

        Answers that arrived are in the journal.
        """
        self._calls = self._failures = self._known = 0
        self._stop = None
        self._pace.reopen()
        work = items(problems, rollouts, verdicts, self._segment)
        loop = self._runner.get_loop()
        sentence = (
            f"annotator {self._config.name}: stopped; answers that arrived are kept and not paid again: "
            "the same command goes on from there"
        )
        with drained(lambda: loop.call_soon_threadsafe(self._drain), sentence):
            rows = self._runner.run(self._annotate(work, rollouts.num_rows))
        # Those that the journal had count: of a few that are asked again each one may fail again.
        if self._stop is None and self._failures * 2 > self._calls + self._known:
            error = next(row["error"] for row in rows if row["error"] is not None)
            self._end_failing(error.removeprefix(NO_ANSWER))
        if self._stop is not None:
            raise InputError(
                f"annotator {self._config.name} at {self._config.base_url}: {self._stop}: answers "
                "that arrived are kept and not paid again"
            )
        return ANNOTATIONS.table(rows)

    def close(self) -> None:
        self._runner.run(self._close_clients())
        self._runner.close()
        try:
            if self._journal is not None and self._commit is not None:
                self._commit.close()
                self._journal.close()
        finally:
            self._spending.close()

    def _new_client(self) -> openai.AsyncOpenAI:
        config = self._config
        return transport.async_client(config.base_url, self._key, config.timeout_s)

    async def _close_clients(self) -> None:
        """After a second signal requests are still in flight: without them first."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for client in self._clients:
            await client.close()

    async def _annotate(self, work: Iterator[Item], number: int) -> list[dict[str, Any]]:
        rows: list[Any] = [None] * number
        queue = enumerate(work)
        # No more than may be in flight: each asks again once its answer is on the disk, so that their number
        # is also the most that a kill can lose.
        count = min(self._config.concurrency, number)
        workers = [asyncio.create_task(self._work(queue, rows)) for _ in range(count)]
        try:
            await asyncio.gather(*map(asyncio.shield, workers))
        except BaseException:  # requests in flight are paid for and end first
            self._drain()
            await asyncio.gather(*workers, return_exceptions=True)
            raise
        return rows

    def _drain(self) -> None:
        """Send nothing new. What is in flight ends by its deadline, `timeout_s`."""
        closed = self._pace.closed
        self._pace.close()
        if not closed:
            logger.warning("%s: waiting for requests in flight", self._config.name)

    async def _work(self, queue: Iterator[tuple[int, Item]], rows: list[Any]) -> None:
        try:
            for index, item in queue:
                if self._pace.closed:
                    return
                rows[index] = await self._row(item)
        except BudgetSpent as spent:
            self._end(f"{spent}; raise annotator.budget_usd and run again to go on")
        except AskedToWait as asked:
            self._end(f"it asks to wait {asked}; run again then")
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
                answers.append(await self._answer(question))
                question = talk.send(answers[-1])
        except StopIteration as done:
            reading = done.value
        except endpoint.FAILURES as error:
            reading = self._failed(error)
        raw = answers[-1].text if answers else None
        return annotation_row(item, self._who, reading, self._spending.row(answers), raw)

    def _failed(self, error: Exception) -> Reading:
        said = endpoint.sentence(error, self._key)
        self._calls += 1
        self._failures += 1
        often = self._failures >= _FEWEST_FAILURES and self._failures * 2 > self._calls
        if endpoint.condemns_all(error) or often:
            self._end_failing(said)
        logger.warning("%s: %s", self._config.name, said)
        passing = NO_ANSWER if endpoint.may_pass(error) else ""
        return Reading(AnnotationStatus.FAILED, error=f"{passing}{said}")

    def _end_failing(self, said: str) -> None:
        self._end(
            f"{self._failures} of {self._calls} calls failed ({said}); mend that and run again"
        )

    def _end(self, why: str) -> None:
        """No new request; those in flight end and are kept. The first reason is the one told."""
        self._stop = self._stop or why
        self._pace.close()

    async def _answer(self, question: Question) -> Answer:
        """The answer from the journal, else from the endpoint by way of the journal."""
        key = question_key(self._config, self._prompt, question)
        record = self._journal.get(key) if self._journal is not None else None
        if record is None:
            if key not in self._asking:  # equal responses of a group are one question
                self._asking[key] = asyncio.create_task(self._bought(key, question))
                self._asking[key].add_done_callback(lambda _: self._asking.pop(key))
            record = await self._asking[key]
            self._calls += 1
        else:
            self._known += 1
        return read_record(record)

    async def _bought(self, key: str, question: Question) -> Record:
        """One paid answer, unless another run on this store asks the same: then that one's."""
        if self._journal is None or self._journal.claims is None:
            return await self._ask(key, question)
        async with self._journal.claims.held(key, self._pace.sleep, self._config.patience_s):
            record = self._journal.get(key)
            return await self._ask(key, question) if record is None else record

    async def _ask(self, key: str, question: Question) -> Record:
        """One paid answer; without a parameter if only that makes the endpoint take the request."""
        refused = self._refused
        while True:
            retrying = AsyncRetrying(
                retry=retry_if_exception(endpoint.may_pass),
                wait=endpoint.wait_s,
                stop=stop_after_attempt(self._config.max_attempts),
                sleep=self._pace.sleep,
                reraise=True,
            )
            try:
                record = await retrying(self._send, key, question, refused)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                name = endpoint.refused_parameter(error, refused)
                if name is None or name in refused:
                    raise
                refused |= {name}
                continue
            if news := refused - self._refused:
                logger.warning(
                    "%s refuses %s: going on without it",
                    self._config.base_url,
                    " and ".join(sorted(news)),
                )
                self._refused |= news
            return record

    async def _send(self, key: str, question: Question, refused: frozenset[str]) -> Record:
        """One attempt. Returns when the answer is in the journal."""
        body = request_body(self._config, self._prompt, question, refused)
        size = sum(len(message["content"].encode()) for message in question.messages)
        tokens = size / _BYTES_PER_TOKEN + question.max_new_tokens
        async with (
            self._spending.reserve(body) as reservation,
            self._pace.slot(tokens) as entered,
        ):
            reserved = await self._reserve(reservation)
            # From here on it may be billed, whatever happens to the answer.
            reservation.settle(None)
            began = time.monotonic()
            try:
                response = await self._exchange(body)
                record = {
                    "latency_s": round(time.monotonic() - began, 4),
                    "body": checked_body(endpoint.without_key(response.content, self._key)),
                }
            except endpoint.FAILURES as error:
                if not endpoint.may_be_billed(error):
                    reservation.settle(0.0)
                    self._settle(reserved)
                self._attempt_failed(error, entered)
                raise
            answer = read_record(record)
            reservation.settle(self._spending.cost_usd([answer]))
            used = (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
            self._pace.succeeded(tokens - used if used else 0.0)
            for kind, amount in (("requests", 1.0), ("tokens", tokens)):
                if wait := endpoint.refill_s(response.headers, kind, amount):
                    self._pace.hold(wait)
        if self._commit is not None:
            await self._commit.append(key, bounded(record, lambda: most_tokens(body)), reserved)
        return record

    async def _reserve(self, reservation: Reservation) -> str | None:
        """Keep on the disk that a request may be billed; its name, None if no budget counts it."""
        if self._commit is None or not reservation.usd:
            return None
        return await self._commit.reserve(reservation.usd)

    def _settle(self, reserved: str | None) -> None:
        if self._commit is not None and reserved is not None:
            self._commit.settle(reserved)

    async def _exchange(self, body: dict[str, Any]) -> httpx2.Response:
        """The HTTP response to a request. `create` would check each field of the body anew."""
        client = next(self._turns)
        return await client.post("/chat/completions", cast_to=httpx2.Response, body=body)

    def _attempt_failed(self, error: Exception, entered: float) -> None:
        if endpoint.condemns_all(error):
            self._pace.close()  # before another one gets the slot
        if not endpoint.may_pass(error):
            return
        asked, patience = endpoint.retry_after_s(error), self._config.patience_s
        self._pace.failed(entered, asked, endpoint.overloaded(error))
        said = endpoint.sentence(error, self._key)
        if asked is not None and asked > patience:
            self._end(f"it asks to wait {asked:.0f} s ({said}); run again then")
        elif self._pace.failing_s > patience:
            self._end(f"no answer for {patience:g} s ({said}); see whether it is up and run again")
