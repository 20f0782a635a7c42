"""Protocols of exchangeable engines (samplers, verifiers, annotators) and the records they
exchange.

pipelines/samplers, pipelines/verifiers and pipelines/annotators implement them; online.py and the
stages call them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ..schemas.configs import SamplingConfig
from ..schemas.labels import FinishReason


@dataclass(frozen=True)
class PolicyInfo:
    """A policy's identity: name, hash of its files, optimiser steps since, hash of its
    vocabulary.
    """

    name: str
    revision: str
    step: int = 0
    vocab_fingerprint: str = ""


@dataclass(frozen=True)
class Prompt:
    """A chat prompt, with its token ids if the tokenizer is known.

    thinking: the chat template's enable_thinking, for engines that render the template themselves.
    """

    messages: list[dict[str, str]]
    token_ids: list[int] | None = None
    thinking: bool | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    token_ids: the sampler's own, with the end token; None if the engine does not return them.
    logprobs: one per token, natural log under the policy at the sampling temperature, before top-p,
        top-k and a schema's mask; a list or a float32 array (tokens,). None if the engine returns
        none, or only those after truncation.
    text: the decoded bytes of token_ids without special tokens.
    """

    text: str
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    logprobs: list[float] | np.ndarray | None = None
    prompt_token_ids: list[int] | None = None


class Sampler(Protocol):
    """A sampling engine: samples `len(seeds[i])` responses to `prompts[i]`.

    schemas: a JSON schema per prompt, by constrained decoding. The same prompt, parameters, schema
    and seed give the same response on the same engine.

    Raises:
        InputError: the engine, its server or its vocabulary does not support the schemas.
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


class TrainedPolicy(Protocol):
    """The policy in training. Its weights may be sharded: every rank calls each method, and
    iterates to the end.

    Samplers with weights of their own get it before each step.
    """

    @property
    def info(self) -> PolicyInfo: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by the transformers model's names, in the compute type, one at a time.

        Adapters are merged. Tied weights have each of their names.
        """
        ...

    def adapters(self) -> dict[str, torch.Tensor] | None:
        """The adapters alone, whole, in float32, by peft's names in its files; None: it has none.

        `….lora_A.weight`: (rank, in); `….lora_B.weight`: (out, rank).
        """
        ...

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Per row the log-probabilities of its tokens but the first, (tokens - 1,) float64, nats.

        A row is a list of token ids.
        """
        ...


class Verifier(Protocol):
    """Verifies a rollouts table: one verdicts row per rollout, in order."""

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table: ...

    def close(self) -> None: ...


class Annotator(Protocol):
    """Annotates a rollouts table: one annotations row per rollout, in order."""

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table: ...

    def close(self) -> None: ...
