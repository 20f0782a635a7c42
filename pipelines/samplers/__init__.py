"""Sampling engines behind one protocol (trace.protocols.Sampler)."""

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ...schemas.configs import (
    OpenAISampler,
    PolicyConfig,
    Sampler,
    SamplingConfig,
    VllmSampler,
)
from ...schemas.errors import InputError
from ...trace.policy import Policy, load_policy, load_tokenizer
from ...trace.protocols import Sampler as SamplerProtocol
from ..models import resolve_policy
from .probe import Probe


class Follower(SamplerProtocol, Protocol):
    """A sampler with a copy of its own of the weights that are trained."""

    def follow(self, policy: Policy, probe: Probe) -> None:
        """Take over the policy's weights and identity; the probe has just asked the policy.

        Raises:
            InputError: the engine does not have them afterwards, or can't be reached.
        """
        ...

    def rest(self) -> None:
        """Nothing is sampled until the next `follow`."""
        ...


def open_sampler(
    config: Sampler, policy: PolicyConfig
) -> tuple[SamplerProtocol, PreTrainedTokenizerBase | None]:
    """The engine and, unless it sits behind an API, the policy's tokenizer.

    Raises:
        InputError: no such policy, a missing package, a missing key.
    """
    if isinstance(config, OpenAISampler):
        from .openai import OpenAIPolicySampler

        return OpenAIPolicySampler(config, policy.path), None
    path = resolve_policy(policy.path)
    if isinstance(config, VllmSampler):
        from .vllm import VllmPolicySampler

        sampler = VllmPolicySampler(config, path, policy.precision, policy.trust_remote_code)
        return sampler, load_tokenizer(path, policy.trust_remote_code)
    from .transformers import TransformersPolicySampler

    loaded = load_policy(
        path, policy.device, policy.precision, trust_remote_code=policy.trust_remote_code
    )
    return TransformersPolicySampler(loaded, config.batch_tokens), loaded.tokenizer


def open_follower(
    config: OpenAISampler | VllmSampler,
    policy: PolicyConfig,
    sampling: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    alone: bool,
) -> Follower:
    """The engine that samples for a trainer.

    folder: of the run's own, where weights pass to servers. alone: no other rank
    trains, and nothing is sampled while the trainer works; then vLLM's engine shares the trainer's
    process and its GPU.

    Raises:
        InputError: a missing package or key, a server that can't be reached or can't follow,
            sampling parameters under which vLLM gives no log-probabilities for a ratio.
    """
    if not sampling.untruncated:
        raise InputError(
            "online.sampling: vLLM gives log-probabilities after top_p, top_k and greedy choice, "
            "which no ratio can be formed with; set top_p=1, top_k=0 and a temperature above 0, or "
            "train.sampler.engine=transformers"
        )
    if isinstance(config, OpenAISampler):
        from .vllm_servers import VllmServersSampler

        return VllmServersSampler(config, tokenizer, folder, sampling.temperature)
    from .vllm import VllmPolicySampler

    in_process = alone and config.tensor_parallel_size == 1
    path = resolve_policy(policy.path)
    return VllmPolicySampler(
        config,
        path,
        policy.precision,
        policy.trust_remote_code,
        in_process=in_process,
        sleeps=alone,
    )
