"""Annotation by a model behind any OpenAI-compatible chat endpoint: a strong API or an own server.

Retries are our own: the client's would also repeat an exhausted quota. What is paid for is in the
journal before it counts, so a stage that stops or is killed goes on without paying twice.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import openai
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
)

from ...schemas.configs import OpenAIAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS
from .. import endpoint
from .dialogue import Answer, Question, dialogue, usage
from .journal import Journal, request_key
from .pace import Pace
from .prompting import AnnotationPrompt
from .rows import SKIPPED, Identity, Item, Reading, annotation_row, items

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
    ) -> None:
        self._config, self._prompt, self._segment = config, prompt, segment
        self._journal = journal
        self._key = endpoint.read_key(config.api_key_env, "annotator.api_key_env")
        self._who = Identity(config.name, config.model, prompt.version)
        self._refused: set[str] = set()
        self._calls = self._failures = 0
        self._stop: str | None = None
        # One loop for all parts: client and pace belong to the loop in which they are first used.
        self._runner = asyncio.Runner()
        self._pace = Pace(config.concurrency, config.requests_per_minute)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",  # without one the client would look for OPENAI_API_KEY
            timeout=config.timeout_s,
            max_retries=0,
        )

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`. Not to be called from a running event loop: it runs its own.

        Raises:
            InputError: more than half of the calls fail, or all of them must. Answers that arrived
                are in the journal.
        """
        self._calls = self._failures = 0
        self._stop = None
        work = items(problems, rollouts, verdicts, self._segment)
        rows = self._runner.run(self._annotate(work))
        if self._stop is None and self._failures * 2 > self._calls:
            self._stop = next(row["error"] for row in rows if row["error"] is not None)
        if self._stop is not None:
            raise InputError(
                f"annotator {self._config.name} at {self._config.base_url}: {self._failures} of "
                f"{self._calls} calls failed ({self._stop}); mend that and run again: answers "
                "that arrived are kept and not paid again"
            )
        return ANNOTATIONS.table(rows)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        if self._journal is not None:
            self._journal.close()

    async def _annotate(self, work: list[Item]) -> list[dict[str, Any]]:
        rows: list[Any] = [None] * len(work)
        queue = iter(enumerate(work))
        workers = min(self._config.concurrency, len(work))
        await asyncio.gather(*(self._work(queue, rows) for _ in range(workers)))
        return rows

    async def _work(self, queue: Iterator[tuple[int, Item]], rows: list[Any]) -> None:
        for index, item in queue:
            if self._stop is not None:  # requests in flight end and are kept, no new ones begin
                return
            rows[index] = await self._row(item)

    async def _row(self, item: Item) -> dict[str, Any]:
        if item.correct is None:
            return annotation_row(item, self._who, SKIPPED)
        talk = dialogue(self._prompt, item, self._config)
        answers: list[Answer] = []
        try:
            question = next(talk)
            while True:
                answers.append(await self._answer(question))
                question = talk.send(answers[-1])
        except StopIteration as done:
            reading = done.value
        except (openai.APIError, endpoint.NotACompletion) as error:
            reading = self._failed(error)
        price = (
            self._config.usd_per_million_prompt_tokens,
            self._config.usd_per_million_completion_tokens,
        )
        raw = answers[-1].text if answers else None
        return annotation_row(item, self._who, reading, usage(answers, price), raw)

    def _failed(self, error: Exception) -> Reading:
        said = endpoint.sentence(error, self._key)
        self._failures += 1
        often = self._failures >= _FEWEST_FAILURES and self._failures * 2 > self._calls
        if endpoint.condemns_all(error) or often:
            self._stop = said
        logger.warning("%s: %s", self._config.name, said)
        return Reading(AnnotationStatus.FAILED, error=said)

    async def _answer(self, question: Question) -> Answer:
        """The answer from the journal, else from the endpoint by way of the journal."""
        key = request_key(
            self._config.base_url,
            self._config.model,
            question.messages,
            self._prompt.schema if self._config.structured else None,
            {
                "temperature": self._config.temperature,
                "max_new_tokens": question.max_new_tokens,
            },
            self._prompt.version,
        )
        record = self._journal.get(key) if self._journal is not None else None
        if record is None:
            self._calls += 1
            record = await self._ask(question)
            if self._journal is not None:
                await asyncio.to_thread(self._journal.append, key, record)
        return _read_record(record)

    async def _ask(self, question: Question) -> dict[str, Any]:
        """One paid answer; parameters that the endpoint refuses are left out from then on."""
        while True:
            refused = frozenset(self._refused)
            retrying = AsyncRetrying(
                retry=retry_if_exception(endpoint.may_pass),
                wait=endpoint.wait_s,
                stop=stop_after_attempt(self._config.max_attempts),
                reraise=True,
            )
            try:
                return await retrying(self._send, question, refused)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                name = endpoint.refused_parameter(error)
                if name is None or name in refused:
                    raise
                if name not in self._refused:
                    logger.warning(
                        "%s refuses %s: going on without it", self._config.base_url, name
                    )
                self._refused.add(name)

    async def _send(self, question: Question, refused: frozenset[str]) -> dict[str, Any]:
        async with self._pace.slot() as entered:
            began = time.monotonic()
            try:
                response = await self._client.chat.completions.with_raw_response.create(
                    **self._request(question, refused),
                    extra_headers={} if self._key else {"Authorization": openai.Omit()},  # type: ignore[arg-type]
                )
                body = _checked_body(response.http_response.content)
            except openai.APIStatusError as error:
                if endpoint.overloaded(error) and endpoint.may_pass(error):
                    self._pace.rejected(entered, endpoint.retry_after_s(error))
                raise
            self._pace.succeeded()
            return {"latency_s": round(time.monotonic() - began, 4), "body": body}

    def _request(self, question: Question, refused: frozenset[str]) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": question.messages,
            limit: question.max_new_tokens,
        }
        if "temperature" not in refused:
            request["temperature"] = self._config.temperature
        if self._config.structured and "response_format" not in refused:
            schema = {"name": "annotation", "schema": self._prompt.schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Body(BaseModel):
    """The part of a chat completion that is read; servers add and leave out the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _checked_body(content: bytes) -> dict[str, Any]:
    try:
        _Body.model_validate_json(content)
    except ValidationError as error:
        raise endpoint.NotACompletion(f"{error.errors()[0]['msg']} in {content[:120]!r}") from None
    return json.loads(content)


def _read_record(record: dict[str, Any]) -> Answer:
    body = _Body.model_validate(record["body"])
    choice, tokens = body.choices[0], body.usage
    return Answer(
        choice.message.refusal or choice.message.content or "",
        cut=choice.finish_reason == "length",
        refused=choice.message.refusal is not None,
        prompt_tokens=tokens.prompt_tokens if tokens else None,
        completion_tokens=tokens.completion_tokens if tokens else None,
        latency_s=record["latency_s"],
    )
