"""What can be swapped: samplers, verifiers, annotators, and what travels between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from ..schemas.configs import SamplingConfig
from ..schemas.labels import FinishReason


@dataclass(frozen=True)
class PolicyInfo:
    """Which policy samples: name, hash of its files, optimiser steps since, vocabulary's hash."""

    name: str
    revision: str
    step: int = 0
    vocab_fingerprint: str = ""


@dataclass(frozen=True)
class Prompt:
    """A chat prompt, and its token ids where the tokenizer is known.

    thinking: enable_thinking of the chat template, for engines that render it themselves.
    """

    messages: list[dict[str, str]]
    token_ids: list[int] | None = None
    thinking: bool | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    token_ids: the sampler's own, the end token included; None if the engine does not tell.
    logprobs: natural log under the policy at the sampling temperature, before top-p, top-k and a
        schema's mask; None if the engine does not tell, or tells only those after truncation.
    text: the bytes of token_ids without special tokens, as text.
    """

    text: str
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt_token_ids: list[int] | None = None


class Sampler(Protocol):
    """A sampling engine. `len(seeds[i])` responses are sampled for `prompts[i]`.

    schemas: a JSON schema per prompt that its responses follow (constrained decoding).

    The same prompt, parameters, schema and seed give the same response on the same engine.

    Raises:
        InputError: the engine, its server or its vocabulary can't keep to the schemas.
    """

    @property
    def policy(self) -> PolicyInfo: ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]: ...

    def close(self) -> None: ...


class Verifier(Protocol):
    """Judges a rollouts table: one verdicts row per rollout, in order."""

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table: ...

    def close(self) -> None: ...


class Annotator(Protocol):
    """Marks spans: one annotations row per rollout, in order."""

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table: ...

    def close(self) -> None: ...
