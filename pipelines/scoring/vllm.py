"""Engine vllm: a teacher behind vLLM servers, by the log-probabilities of prompts.

A request is the teacher's prompt and the response up to its last routed token, as token ids, with
`prompt_logprobs=k` and one token to generate. The servers compute at temperature 1, and send only
the likeliest tokens: the rest is what their probabilities lack to 1.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from typing import Any

import httpx2
import numpy as np
import openai
import pyarrow.compute as pc
from tenacity import RetryCallState

from ...data.store import Dataset
from ...schemas.configs import ScoreConfig, VllmTeacher
from ...schemas.errors import InputError
from ...trace.policy import load_tokenizer, vocab_fingerprint
from ...trace.sequences import TrainingSequence
from .. import endpoint, transport
from ..models import served_model
from ..progress import count_rows
from ..runtime.event_loop import EventLoop
from ..samplers.pool import Pool, error_of, retrying
from .engine import Engine, Scored, Vocabulary
from .prompt_logprobs import read_scores

logger = logging.getLogger(__name__)

# Of an answer, per likeliest token: its id, log-probability, rank and text, which JSON escapes.
_ENTRY_BYTES = 320
_LEAST_BYTES = 1 << 20


class VllmEngine:
    """See `Engine`."""

    def __init__(self, config: ScoreConfig) -> None:
        assert isinstance(config.teacher, VllmTeacher)
        self._config, self._teacher = config, config.teacher

    def identity(self, vocabulary: Vocabulary, routed: Dataset) -> dict[str, Any]:
        teacher = self._teacher
        endpoint.read_key(teacher.api_key_env, "teacher.api_key_env")
        self._check_temperature(routed)
        local = served_model(teacher.model)
        if local is not None and _fingerprint(local[0]) not in (None, vocabulary.fingerprint):
            raise InputError(
                f"teacher {teacher.model}: has another vocabulary than policy "
                f"{self._config.policy.path}, so its log-probabilities are of other tokens; name "
                "a model of the same vocabulary"
            )
        return {"teacher": [*teacher.servers, teacher.model, *([] if local is None else local[1:])]}

    def _check_temperature(self, routed: Dataset) -> None:
        """Raises InputError if the students' temperature is another one than the servers' 1."""
        if self._config.temperature is not None:
            return
        for part in range(routed.parts):
            given = pc.drop_null(routed.read_part(part, ["temperature"])["temperature"])
            heats = set(given.to_pylist()) - {0.0, 1.0}
            if heats:
                raise InputError(
                    f"dataset {routed.ref}: was sampled at temperature {heats.pop():g}, and a "
                    "server's prompt log-probabilities are those of temperature 1; set "
                    "temperature=1 to take the teacher so, or use teacher.engine=local"
                )

    def open(self, vocabulary: Vocabulary) -> "VllmScorer":
        return VllmScorer(self._config, self._teacher, vocabulary)


def _fingerprint(folder: str) -> str | None:
    try:
        return vocab_fingerprint(load_tokenizer(folder))
    except InputError:  # none there, or one with code of its own
        return None


class VllmScorer:
    """See `Scorer`. That a server holds the weights of that name is not checked."""

    extras: tuple[str, ...] = ()

    def __init__(self, config: ScoreConfig, teacher: VllmTeacher, vocabulary: Vocabulary) -> None:
        self._config, self._teacher, self._vocabulary = config, teacher, vocabulary
        self._key = endpoint.read_key(teacher.api_key_env, "teacher.api_key_env")
        self._where = ", ".join(teacher.servers)
        local = served_model(teacher.model)
        self.name, self.revision = teacher.model, teacher.model if local is None else local[1]
        self._k = min(config.k, vocabulary.size)

    def score(self, sequences: Sequence[TrainingSequence]) -> list[Scored]:
        """See `Scorer`.

        Raises:
            InputError: no server can be reached, refuses the requests, stays unavailable for
                `timeout_s`, or sends impossible values.
        """
        try:
            with closing(EventLoop()) as loop:
                return loop.run(self._score(sequences))
        except endpoint.FAILURES as error:
            sentence = self._explanation(error)
        raise InputError(sentence)  # outside, so that no cause is attached: it may hold the key

    async def _score(self, sequences: Sequence[TrainingSequence]) -> list[Scored]:
        pool = Pool(self._teacher.servers)
        slots = asyncio.Semaphore(self._teacher.concurrency)
        longest = max((len(_prompt(one)) for one in sequences), default=0)
        most_bytes = _LEAST_BYTES + longest * (self._k + 1) * _ENTRY_BYTES
        async with AsyncExitStack() as stack:
            clients: dict[str, openai.AsyncOpenAI] = {}
            for server in self._teacher.servers:
                client = transport.async_client(
                    server, self._key, self._teacher.timeout_s, most_bytes
                )
                clients[server] = await stack.enter_async_context(client)

            async def one(sequence: TrainingSequence) -> Scored:
                async with slots:
                    scored = await self._send(pool, clients, sequence)
                count_rows()
                return scored

            tasks = [asyncio.create_task(one(sequence)) for sequence in sequences]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # the others, after an error of one
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(
        self, pool: Pool, clients: dict[str, openai.AsyncOpenAI], sequence: TrainingSequence
    ) -> Scored:
        token_ids = _prompt(sequence)
        start = len(token_ids) - sequence.routed_end
        places = (start + sequence.routed_positions).tolist()
        request = {
            "model": self._teacher.model,
            "prompt": token_ids,
            "prompt_logprobs": self._k,
            "max_tokens": 1,
            "temperature": 1.0,
            "stream": False,
        }

        async def attempt() -> Scored:
            async with pool.server() as server:
                response = await clients[server].post(
                    "/completions", cast_to=httpx2.Response, body=request
                )
            size, tokenizer = self._vocabulary.size, self._vocabulary.tokenizer
            return read_scores(
                response.content, server, token_ids, places, self._k, size, tokenizer
            )

        return await retrying(pool, self._teacher.timeout_s, self._log_retry)(attempt)

    def _log_retry(self, state: RetryCallState) -> None:
        error = error_of(state)
        if error is not None and state.next_action is not None:
            sentence, pause_s = endpoint.sentence(error, self._key), state.next_action.sleep
            logger.warning("%s: %s; again in %.1f s", self._where, sentence, pause_s)

    def _explanation(self, error: Exception) -> str:
        """One sentence: which server failed, how, and what the user can do. Never holds the key."""
        where, detail = self._where, f"({endpoint.sentence(error, self._key)})"
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                variable = self._teacher.api_key_env or "teacher.api_key_env"
                return f"{where}: the API key is refused {detail}; check the one in {variable}"
            case openai.NotFoundError():
                return (
                    f"{where}: not found {detail}; set teacher.model to a model that it serves, "
                    "and teacher.base_url to the part before /completions"
                )
            case openai.APITimeoutError():
                return f"{where}: no answer in time {detail}; raise teacher.timeout_s"
            case openai.APIConnectionError():
                return (
                    f"{where}: cannot be reached {detail}; start the server or fix teacher.base_url"
                )
            case openai.BadRequestError() if "logprobs" in str(error):
                return (
                    f"{where}: does not give {self._k} likeliest tokens {detail}; start it with "
                    f"vllm serve --max-logprobs {self._k}, or lower k"
                )
        return (
            f"{where}: refuses or fails to score a prompt by model {self._teacher.model} {detail}; "
            "see its log"
        )

    def close(self) -> None:
        """Nothing is open between calls."""


def _prompt(sequence: TrainingSequence) -> list[int]:
    """What the teacher reads: its prompt, and the response up to the last routed token."""
    response = np.asarray(sequence.token_ids[: sequence.routed_end])
    return [*(sequence.teacher_prompt_ids or []), *response.tolist()]


ENGINE: type[Engine] = VllmEngine
