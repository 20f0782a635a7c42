"""Sampling over any OpenAI-compatible chat endpoint: `vllm serve`, llama.cpp, a hosted API.

Each response is a request of its own with its own seed. Servers that return token ids (vLLM knows
`return_token_ids`) give rows that can be trained on; the text of others can be verified, annotated
and evaluated. Where the tokenizer is not on this machine, the text is the server's: run it without
a reasoning parser, which would take the thinking out.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
)
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import OpenAISampler, SamplingConfig
from ...schemas.errors import InputError
from ...trace.align import byte_table
from ...trace.policy import load_tokenizer, policy_name, vocab_fingerprint, vocab_size
from ...trace.protocols import Completion, PolicyInfo, Prompt
from .. import endpoint, transport
from ..models import served_model
from .constrained import with_fixed_whitespace
from .pool import Pool, server_failed
from .reply import read_completion

logger = logging.getLogger(__name__)

_UNREACHABLE_ATTEMPTS = 5


@dataclass(frozen=True)
class _Call:
    """What the requests of one call share: a client lives as long as its event loop."""

    pool: Pool
    clients: dict[str, openai.AsyncOpenAI]


class OpenAIPolicySampler:
    """Samples a model by the name under which an endpoint, or each of several, serves it.

    The policy's fingerprints are the model's if the name is a folder, or a hub id in the local
    cache. Otherwise the endpoint stands for the weights and the vocabulary is unknown. That a
    server holds the weights of that name is its operator's word.
    """

    def __init__(
        self,
        config: OpenAISampler,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        admit: Callable[[str], None] | None = None,
        logprobs_at_temperature: bool = False,
    ) -> None:
        """tokenizer: the model's; None: looked for under its name. admit: see `Pool`.
        logprobs_at_temperature: the server is known to report them so.
        """
        self._config, self._model, self._admit = config, model, admit
        self._at_temperature = logprobs_at_temperature
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
        """See `Sampler`. Not to be called from a running event loop: it runs its own.

        Raises:
            InputError: the endpoint cannot be reached, refuses the requests or their schemas, stays
                unavailable for `timeout_s`, asks to wait longer, or sends impossible values.
        """
        try:
            return asyncio.run(self._sample(prompts, sampling, seeds, schemas))
        except endpoint.FAILURES as error:
            said = self._explain(error)
        raise InputError(said)  # outside: the error below, which may echo the key, doesn't hang on

    def close(self) -> None:
        """Nothing stays open between calls: a client lives as long as its event loop."""

    async def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None,
    ) -> list[list[Completion]]:
        formats = [None] * len(prompts) if schemas is None else map(_response_format, schemas)
        plain = schemas is None and sampling.untruncated
        plain = plain and (sampling.temperature == 1 or self._at_temperature)
        slots = asyncio.Semaphore(self._config.concurrency)
        async with AsyncExitStack() as stack:
            call = _Call(Pool(self._config.servers, self._admit), {})
            for server in self._config.servers:
                client = transport.async_client(server, self._key, self._config.timeout_s)
                call.clients[server] = await stack.enter_async_context(client)

            async def one(prompt: Prompt, form: dict[str, Any] | None, seed: int) -> Completion:
                request = self._fields(prompt, sampling, form, seed)
                async with slots:
                    reply = await self._request(call, request, prompt, sampling)
                return self._completion(reply, plain)

            async def group(
                prompt: Prompt, form: dict[str, Any] | None, own: Sequence[int]
            ) -> list[Completion]:
                return await asyncio.gather(*(one(prompt, form, seed) for seed in own))

            completions = await asyncio.gather(*map(group, prompts, formats, seeds))
            self.servers_up = call.pool.up
            return completions

    def _fields(
        self, prompt: Prompt, sampling: SamplingConfig, form: dict[str, Any] | None, seed: int
    ) -> dict[str, Any]:
        """A request in OpenAI's own fields."""
        fields: dict[str, Any] = {
            "model": self._model,
            "messages": prompt.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
        }
        return fields if form is None else fields | {"response_format": form}

    async def _request(
        self,
        call: _Call,
        request: dict[str, Any],
        prompt: Prompt,
        sampling: SamplingConfig,
    ) -> Completion:
        """One response; without the extra fields if the server refuses them and only them."""
        if self._extended:
            try:
                extra = _extra_fields(prompt, sampling)
                return await self._send(call, request | extra, prompt)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                reply = await self._send(call, request, prompt)
            if self._extended:  # else another request in flight found out first
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
        """Repeats what may pass (rate limits, server and connection errors) for `timeout_s`; what a
        server failed to answer goes to another at once.
        """

        def elsewhere(state: RetryCallState) -> bool:
            return bool(call.pool.up) and server_failed(_error(state))

        def give_up(state: RetryCallState) -> bool:
            """When the next attempt would be after `timeout_s`; sooner if no server is there at all,
            rather than busy.
            """
            if elsewhere(state):
                return False
            absent = isinstance(_error(state), openai.APIConnectionError)
            if absent and state.attempt_number >= _UNREACHABLE_ATTEMPTS:
                return True
            next_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
            return next_s >= self._config.timeout_s

        retrying = AsyncRetrying(
            retry=retry_if_exception(endpoint.may_pass),
            wait=lambda state: 0.0 if elsewhere(state) else endpoint.wait_s(state),
            stop=give_up,
            before_sleep=self._tell,
            reraise=True,
        )

        async def attempt() -> Completion:
            async with call.pool.server() as server:
                response = await call.clients[server].post(
                    "/chat/completions", cast_to=httpx2.Response, body=request
                )
            reply = read_completion(
                response.content, server, request["max_tokens"], self.vocab_size, prompt.token_ids
            )
            said = reply.text.encode()
            if endpoint.without_key(said, self._key) != said:
                raise InputError(
                    f"{self._where}: sends the API key back in a response, which would "
                    "become data; use another server"
                )
            return reply

        return await retrying(attempt)

    def _tell(self, state: RetryCallState) -> None:
        error = _error(state)
        if error is not None and state.next_action is not None:
            said = endpoint.sentence(error, self._key)
            pause_s = state.next_action.sleep
            logger.warning("%s: %s; again in %.1f s", self._where, said, pause_s)

    def _completion(self, reply: Completion, plain: bool) -> Completion:
        """plain: neither temperature nor truncation nor a schema stands between the policy and its
        samples. A server may report log-probabilities before or after these (vLLM's
        --logprobs-mode): without them both mean the same.
        """
        text = reply.text
        if reply.token_ids is not None and self._bytes is not None:
            text = self._bytes.text(reply.token_ids)
        return replace(reply, text=text, logprobs=reply.logprobs if plain else None)

    def _explain(self, error: Exception) -> str:
        url, key = self._where, self._config.api_key_env
        said = f"({endpoint.sentence(error, self._key)})"
        asked = endpoint.retry_after_s(error)
        if asked is not None and asked >= self._config.timeout_s:
            return f"{url}: asks to wait {asked:.0f} s {said}; run again then"
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                how = (
                    f"the one in {key}" if key else "sampler.api_key_env, which names its variable"
                )
                return f"{url}: the API key is refused {said}; check {how}"
            case openai.NotFoundError():
                return (
                    f"{url}: not found {said}; set policy.path to a model that it serves, and "
                    "sampler.base_url to the part before /chat/completions"
                )
            case openai.APITimeoutError():
                return f"{url}: no answer in time {said}; raise sampler.timeout_s"
            case openai.APIConnectionError():
                return f"{url}: cannot be reached {said}; start the server or fix sampler.base_url"
            case openai.APIStatusError() if endpoint.refused_parameter(error) == "response_format":
                return (
                    f"{url}: doesn't take a JSON schema {said}; use a server with structured "
                    "outputs, or sample without a schema"
                )
        return f"{url}: refuses or fails to answer a request for model {self._model} {said}"


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _local_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(folder)
    except InputError:  # none there, or one with code of its own
        return None


def _extra_fields(prompt: Prompt, sampling: SamplingConfig) -> dict[str, Any]:
    """Fields beyond OpenAI's own.

    Truncations and penalties are always named: servers have their own defaults (llama.cpp min_p,
    vLLM those of the model's generation_config.json).
    """
    fields: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": True,
        "return_token_ids": True,
    }
    if prompt.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": prompt.thinking}
    return fields


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's field for constrained decoding, which vLLM and llama.cpp know too."""
    named = {"name": "answer", "schema": with_fixed_whitespace(schema), "strict": True}
    return {"type": "json_schema", "json_schema": named}
