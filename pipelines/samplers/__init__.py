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

        sampler = VllmPolicySampler(config, path, policy.precision, policy.trust_remote_code)
        return sampler, load_tokenizer(path, policy.trust_remote_code)
    from .transformers import TransformersPolicySampler

    loaded = load_policy(
        path, policy.device, policy.precision, trust_remote_code=policy.trust_remote_code
    )
    return TransformersPolicySampler(loaded, config.batch_tokens), loaded.tokenizer
