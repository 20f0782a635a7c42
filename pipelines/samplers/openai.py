"""Engine openai: samples over any OpenAI-compatible chat endpoint (vLLM, llama.cpp, a hosted API).

Each response is one request with its own seed. Servers that return token ids (vLLM knows
`return_token_ids`) give rows that can be trained on; text from others can be verified, annotated
and evaluated. Without a local tokenizer the text is the server's: run the server without a
reasoning parser, which would remove the thinking. Training asks vllm_servers.py instead.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import openai
from tenacity import RetryCallState
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import OpenAISampler, PolicyConfig, SamplingConfig
from ...schemas.errors import InputError
from ...trace.align import byte_table
from ...trace.lora import adapter_form
from ...trace.policy import load_tokenizer, policy_name, vocab_fingerprint, vocab_size
from ...trace.protocols import Completion, PolicyInfo, Prompt, Sampler
from .. import endpoint, transport
from ..models import served_model
from ..progress import count_tokens
from ..runtime.event_loop import EventLoop
from ..runtime.signals import announce, drained
from .chat_request import explanation, extra_fields, request_fields, response_format
from .engine import Engine, Training, require_ratios
from .kept import KeptAnswers
from .pool import Pool, error_of, retrying
from .reply import read_completion
from .weights import hands_adapters

logger = logging.getLogger(__name__)


class OpenAIEngine:
    """See `Engine`."""

    served = True
    follows = True
    batch_tokens: int | None = None

    def __init__(self, config: OpenAISampler, policy: PolicyConfig) -> None:
        self._config, self._policy = config, policy

    def identity(self) -> list[str]:
        endpoint.read_key(self._config.api_key_env, "sampler.api_key_env")
        model = self._policy.path
        local = served_model(model)  # its tokenizer makes the rows' text and fingerprints
        return [*self._config.servers, model, *([] if local is None else local[1:])]

    def context(self) -> int | None:
        return None

    def open(self) -> tuple["OpenAIPolicySampler", None]:
        return OpenAIPolicySampler(self._config, self._policy.path), None

    def open_in_training(self, training: Training) -> Sampler:
        require_ratios(training.sampling)
        from .vllm_servers import VllmServersSampler

        shared = self._config.weights_folder
        folder = Path(shared) / training.folder.name if shared else training.folder / "weights"
        temperature = training.sampling.temperature
        model = training.policy.model
        return VllmServersSampler(
            self._config,
            training.policy.tokenizer,
            folder,
            temperature,
            model.get_input_embeddings().num_embeddings,
            adapter_form(model) if hands_adapters(self._config, model) else None,
        )


class _Stopping(Exception):
    """The run stops and a request waited, which must not be sent."""


@dataclass(frozen=True)
class _Call:
    """What the requests of one `sample` share. A client lives as long as its event loop."""

    pool: Pool
    clients: dict[str, openai.AsyncOpenAI] = field(default_factory=dict)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Send nothing new."""
        waiting = f"waiting for {self.pool.in_flight} answers, Ctrl-C again to leave them"
        announce(waiting)
        self.stopping.set()

    async def sleep(self, seconds: float) -> None:
        """Raises _Stopping once the run stops."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.stopping.is_set():
            raise _Stopping


class OpenAIPolicySampler:
    """Samples a model by the name under which an endpoint, or each of several, serves it.

    The policy's fingerprints are the model's if the name is a folder or a hub id in the local
    cache. Otherwise the endpoint stands for the weights and the vocabulary is unknown. That a
    server holds the weights of that name is not checked.
    """

    def __init__(
        self,
        config: OpenAISampler,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        admit: Callable[[str], None] | None = None,
        logprobs_at_temperature: bool = False,
    ) -> None:
        """tokenizer: the model's; None: the one under its name, if any. admit: see `Pool`.
        logprobs_at_temperature: the server is known to report them at the sampling temperature.
        """
        self._config, self.model, self._admit = config, model, admit
        self._at_temperature = logprobs_at_temperature
        self.kept: KeptAnswers | None = None  # of the part that is sampled
        self._where = ", ".join(config.servers)
        self._key = endpoint.read_key(config.api_key_env, "sampler.api_key_env")
        folder, revision = served_model(model) or (None, self._where)
        if tokenizer is None and folder is not None:
            tokenizer = _local_tokenizer(folder)
        if tokenizer is None:
            self._bytes = None
            self.policy = PolicyInfo(model, self._where)
        else:
            self._bytes = byte_table(tokenizer)
            name = policy_name(folder or model)
            self.policy = PolicyInfo(name, revision, 0, vocab_fingerprint(tokenizer))
        # The model's, which may be larger than the tokenizer's. None: unknown.
        self.vocab_size = None if folder is None else vocab_size(folder)
        self.servers_up: frozenset[str] = frozenset()  # at the end of the last call
        self._extended = True  # until the server refuses a request for its extra fields

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`. Ctrl-C and SIGTERM wait for the answers in flight, where they are kept.

        Raises:
            Stopped, Interrupted: SIGTERM or Ctrl-C.
            InputError: the endpoint cannot be reached, refuses the requests or their schemas, stays
                unavailable for `timeout_s`, asks to wait longer, or sends impossible values.
        """
        call = _Call(Pool(self._config.servers, self._admit))
        loop, kept = EventLoop(), self.kept
        count = sum(map(len, seeds))
        drain = nullcontext()
        if kept is not None:
            drain = drained(
                lambda: loop.soon(call.stop),
                lambda: (
                    f"stopped; {len(kept)} of {count} answers of this part are kept, and all "
                    "parts before"
                ),
            )
        try:
            with closing(loop), drain, suppress(_Stopping):
                return loop.run(self._sample(call, prompts, sampling, seeds, schemas))
            raise AssertionError("a stop raises")
        except endpoint.FAILURES as error:
            sentence = explanation(error, self._config, self.model, self._key)
        raise InputError(sentence)  # outside, so that no cause is attached: it may hold the key

    def close(self) -> None:
        """Nothing is open between calls."""

    async def _sample(
        self,
        call: _Call,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None,
    ) -> list[list[Completion]]:
        formats = [None] * len(prompts) if schemas is None else map(response_format, schemas)
        plain = schemas is None and sampling.untruncated
        plain = plain and (sampling.temperature == 1 or self._at_temperature)
        slots = asyncio.Semaphore(self._config.concurrency)
        async with AsyncExitStack() as stack:
            for server in self._config.servers:
                client = transport.async_client(server, self._key, self._config.timeout_s)
                call.clients[server] = await stack.enter_async_context(client)

            async def one(prompt: Prompt, form: dict[str, Any] | None, seed: int) -> Completion:
                request = request_fields(self.model, prompt, sampling, form, seed)
                reply = None if self.kept is None else self.kept.get(request)
                if reply is None:
                    async with slots:
                        if call.stopping.is_set():
                            raise _Stopping
                        reply = await self._request(call, request, prompt, sampling)
                    if self.kept is not None:
                        self.kept.add(request, reply)
                count_tokens(len(reply.token_ids or ()), responses=1)
                return self._completion(reply, plain)

            tasks = [
                [asyncio.create_task(one(prompt, form, seed)) for seed in own]
                for prompt, form, own in zip(prompts, formats, seeds, strict=True)
            ]
            flat = [task for own in tasks for task in own]
            try:
                await asyncio.gather(*flat)
            except _Stopping:
                await asyncio.gather(*flat, return_exceptions=True)
                raise
            self.servers_up = call.pool.up
            return [[task.result() for task in own] for own in tasks]

    async def _request(
        self,
        call: _Call,
        request: dict[str, Any],
        prompt: Prompt,
        sampling: SamplingConfig,
    ) -> Completion:
        """One response; without the extra fields if the server refuses only them."""
        if self._extended:
            try:
                extra = extra_fields(prompt, sampling)
                return await self._send(call, request | extra, prompt)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                reply = await self._send(call, request, prompt)
            if self._extended:  # otherwise a concurrent request has already logged it
                logger.warning("%s: gives no token ids (unknown fields)", self._where)
            self._extended = False
            if not sampling.top_k:
                return reply
        if sampling.top_k:
            raise InputError(
                f"{self._where}: does not know top_k; set sampling.top_k=0 or use another server"
            )
        return await self._send(call, request, prompt)

    async def _send(self, call: _Call, request: dict[str, Any], prompt: Prompt) -> Completion:
        """A response; transient failures are retried (pool.py)."""

        async def attempt() -> Completion:
            async with call.pool.server() as server:
                response = await call.clients[server].post(
                    "/chat/completions", cast_to=httpx2.Response, body=request
                )
            reply = read_completion(
                response.content, server, request["max_tokens"], self.vocab_size, prompt.token_ids
            )
            text = reply.text.encode()
            if endpoint.without_key(text, self._key) != text:
                raise InputError(
                    f"{self._where}: sends the API key back in a response, which would "
                    "become data; use another server"
                )
            return reply

        again = retrying(call.pool, self._config.timeout_s, self._log_retry, call.sleep)
        return await again(attempt)

    def _log_retry(self, state: RetryCallState) -> None:
        error = error_of(state)
        if error is not None and state.next_action is not None:
            sentence, pause_s = endpoint.sentence(error, self._key), state.next_action.sleep
            logger.warning("%s: %s; again in %.1f s", self._where, sentence, pause_s)

    def _completion(self, reply: Completion, plain: bool) -> Completion:
        """plain: samples follow the policy itself, without temperature, truncation or a schema. A
        server may report log-probabilities before or after these (vLLM's --logprobs-mode); both are
        the same without them.
        """
        text = reply.text
        if reply.token_ids is not None and self._bytes is not None:
            text = self._bytes.text(reply.token_ids)
        return replace(reply, text=text, logprobs=reply.logprobs if plain else None)


def _local_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(folder)
    except InputError:  # none there, or one with code of its own
        return None


ENGINE: type[Engine] = OpenAIEngine
