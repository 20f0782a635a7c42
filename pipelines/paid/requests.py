"""Answers of one chat endpoint: paced, retried, journalled, each paid for once.

Called by the engine `openai`, which makes rows of them. An answer is in the journal before it
counts, so a stage that stops or is killed goes on without paying twice.
"""

import asyncio
import logging
import time

import openai
from pydantic_core import to_json
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from ...schemas.configs import PaidEndpoint
from .. import endpoint, transport
from .budget import Reservation
from .completion import bounded, checked_body, question_key, read_record, request_body
from .journal import GroupCommit, Journal, Record
from .journal_lines import Unanswered
from .pace import Pace
from .prices import most_tokens
from .questions import Answer, Question
from .spending import Spending

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 4  # of English prose; the answer's usage replaces the estimate


class Requests:
    """Client, pace and journal of one endpoint. All calls are made in one event loop."""

    def __init__(
        self,
        config: PaidEndpoint,
        journal: Journal | None,
        spending: Spending,
    ) -> None:
        self._config, self._journal, self._spending = config, journal, spending
        self._commit = GroupCommit(journal) if journal is not None else None
        self._key = endpoint.read_key(config.api_key_env, f"{config.role}.api_key_env")
        self._refused: frozenset[str] = frozenset()
        self._asking: dict[str, asyncio.Task[Record]] = {}
        self.stopped: str | None = None  # why nothing more is sent
        self.pace = Pace(
            config.concurrency,
            config.requests_per_minute,
            config.tokens_per_minute,
            config.patience_s,
        )
        self._client = transport.ChatClient(config.base_url, self._key, config.timeout_s)

    def reopen(self) -> None:
        """Send again after `stop` or a drain."""
        self.stopped = None
        self._asking = {key: task for key, task in self._asking.items() if _succeeded(task)}
        self.pace.reopen()

    def stop(self, why: str) -> None:
        """Send nothing new; requests in flight end and are kept. The first reason is reported."""
        self.stopped = self.stopped or why
        self.pace.close()

    def sentence(self, error: Exception) -> str:
        """The error in one short line without the key."""
        return endpoint.sentence(error, self._key)

    def key(self, question: Question) -> str:
        """The journal's key of a question: equal responses of a group are one question."""
        return question_key(self._config, question)

    def journalled(self, key: str) -> Answer | None:
        """The answer that the journal has."""
        record = self._journal.get(key) if self._journal is not None else None
        return None if record is None else read_record(record)

    async def answer(self, key: str, question: Question) -> tuple[Answer, bool]:
        """The answer from the journal, else from the endpoint; whether the journal had it.

        A question is asked once until `reopen`, even if it fails.

        Raises:
            endpoint.FAILURES: the last attempt's error.
            BudgetSpent, AskedToWait, Closed: nothing was sent.
        """
        if (answer := self.journalled(key)) is not None:
            return answer, True
        if key not in self._asking:
            self._asking[key] = asyncio.create_task(self._claimed(key, question))
            self._asking[key].add_done_callback(lambda task: self._asked(key, task))
        return read_record(await self._asking[key]), False

    def _asked(self, key: str, task: asyncio.Task[Record]) -> None:
        """Forget an answer that the journal has."""
        if self._journal is not None and not task.cancelled() and task.exception() is None:
            del self._asking[key]

    async def close(self) -> None:
        """End requests that are in flight after a second signal, then the client."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._client.close()

    def close_journal(self) -> None:
        if self._journal is not None and self._commit is not None:
            self._commit.close()
            self._journal.close()

    async def _claimed(self, key: str, question: Question) -> Record:
        """One paid answer; another run's if one on this store asks the same question."""
        if self._journal is None or self._journal.claims is None:
            return await self._ask(key, question)
        async with self._journal.claims.held(key, self.pace.sleep, self._config.patience_s):
            record = self._journal.get(key)
            return await self._ask(key, question) if record is None else record

    async def _ask(self, key: str, question: Question) -> Record:
        """One paid answer. Parameters that the endpoint refuses are left out from then on."""
        refused = self._refused
        while True:
            retrying = AsyncRetrying(
                retry=retry_if_exception(endpoint.may_pass),
                wait=endpoint.wait_s,
                stop=stop_after_attempt(self._config.max_attempts),
                sleep=self.pace.sleep,
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
                names = " and ".join(sorted(news))
                logger.warning("%s refuses %s: going on without it", self._config.base_url, names)
                self._refused |= news
            return record

    async def _send(self, key: str, question: Question, refused: frozenset[str]) -> Record:
        """One attempt. Returns when the answer is in the journal."""
        body = request_body(self._config, question, refused)
        size = sum(len(message["content"].encode()) for message in question.messages)
        tokens = size / _BYTES_PER_TOKEN + question.max_new_tokens
        async with (
            self._spending.reserve(body) as reservation,
            self.pace.slot(tokens) as entered,
        ):
            reserved = await self._reserve(reservation)
            # From here on the request may be billed, answer or not.
            reservation.unanswered()
            began = time.monotonic()
            try:
                response = await self._client.post(to_json(body))
                record = {
                    "latency_s": round(time.monotonic() - began, 4),
                    "body": checked_body(endpoint.without_key(response.content, self._key)),
                }
            except endpoint.FAILURES as error:
                billed = endpoint.may_be_billed(error)
                if not billed:
                    reservation.settle(0.0)
                    if self._commit is not None and reserved is not None:
                        self._commit.settle(reserved)
                self._count(key, error, most_tokens(body) if billed and not reserved else None)
                self._attempt_failed(error, entered)
                raise
            answer = read_record(record)
            reservation.settle(self._spending.cost_usd([answer]))
            used = (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
            self.pace.succeeded(tokens - used if used else 0.0)
            for kind, amount in (("requests", 1.0), ("tokens", tokens)):
                if wait := endpoint.refill_s(response.headers, kind, amount):
                    self.pace.hold(wait)
        if self._commit is not None:
            await self._commit.append(key, bounded(record, lambda: most_tokens(body)), reserved)
        return record

    async def _reserve(self, reservation: Reservation) -> str | None:
        """Journal that a request may be billed; the reservation's name, None without a budget."""
        if self._commit is None or not reservation.usd:
            return None
        return await self._commit.reserve(reservation.usd)

    def _count(self, key: str, error: Exception, at_most: tuple[int, int] | None) -> None:
        """Keep why a request has no answer, and what it may cost where nothing is reserved."""
        reason = endpoint.failure_kind(error)
        self._spending.unanswered(reason)
        if self._commit is not None:
            self._commit.unanswered(Unanswered(key, reason, at_most))

    def _attempt_failed(self, error: Exception, entered: float) -> None:
        if endpoint.condemns_all(error):
            self.pace.close()  # before another one gets the slot
        if not endpoint.may_pass(error):
            return
        asked, patience = endpoint.retry_after_s(error), self._config.patience_s
        self.pace.failed(entered, asked, endpoint.overloaded(error))
        text = self.sentence(error)
        if asked is not None and asked > patience:
            self.stop(f"it asks to wait {asked:.0f} s ({text}); run again then")
        elif self.pace.failing_s > patience:
            self.stop(f"no answer for {patience:g} s ({text}); check that it is up and run again")


def _succeeded(task: asyncio.Task[Record]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
