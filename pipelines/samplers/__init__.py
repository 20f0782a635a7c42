"""Sampling engines behind one protocol (trace.protocols.Sampler)."""

from transformers import PreTrainedTokenizerBase

from ...schemas.configs import OpenAISampler, PolicyConfig, Sampler, VllmSampler
from ...trace.policy import load_policy, load_tokenizer
from ...trace.protocols import Sampler as SamplerProtocol
from ..models import resolve_policy


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

        return VllmPolicySampler(config, path, policy.precision), load_tokenizer(path)
    from .transformers import TransformersPolicySampler

    loaded = load_policy(path, policy.device, policy.precision)
    return TransformersPolicySampler(loaded, config.batch_tokens), loaded.tokenizer
