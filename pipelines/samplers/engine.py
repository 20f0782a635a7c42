"""What every sampling engine answers for itself, and what the engines share.

One file per engine implements `Engine`; `samplers.sampling_engine` finds it by the config's tag.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ...schemas.configs import PolicyConfig, SamplingConfig
from ...schemas.errors import InputError
from ...trace.clock import Phase
from ...trace.identity import model_revision
from ...trace.policy import Policy, load_tokenizer
from ...trace.prompt import render_chat
from ...trace.protocols import Sampler, TrainedPolicy
from ..models import resolve_policy
from .probe import Probe


class Follower(Sampler, Protocol):
    """A sampler with its own copy of the weights that are trained."""

    def follow(self, policy: TrainedPolicy, probe: Probe, phase: Phase) -> None:
        """Load the policy's weights and identity. The probe holds the policy's current scores.

        phase: called as a part of this begins: wake, of an engine that slept; hand_over; probe.
        Every rank that has an engine calls; the others call `weights.take_part`.

        Raises:
            InputError: the engine does not have the weights afterwards, or can't be reached.
        """
        ...

    def rest(self, phase: Phase) -> None:
        """Nothing is sampled until the next `follow`. phase: called with sleep, if it sleeps."""
        ...


@dataclass(frozen=True)
class Training:
    """The training that an engine samples for.

    policy: the weights that are trained, or this rank's copy of them. folder: the run's own, named
    by its id. ahead: steps are sampled while others train; otherwise the two take turns, so an
    engine may share the trainer's process and GPU. ranks: how many train; each of them has an
    engine of its own, but for servers. fp32_head: the loss's logits are float32 in any precision.
    """

    policy: Policy
    sampling: SamplingConfig
    folder: Path
    ahead: bool = False
    ranks: int = 1
    fp32_head: bool = False


class Engine(Protocol):
    """A sampling engine for one config and policy, not opened yet.

    served: servers sample; one rank is enough to ask them, and they can't sample a local folder.
    follows: in training it has its own copy of the weights (`Follower`); otherwise it samples with
    the weights that are trained, in their memory.
    batch_tokens: tokens of prompts and responses in flight at once; None: no limit known here.
    """

    served: bool
    follows: bool
    batch_tokens: int | None

    def identity(self) -> list[str]:
        """Who samples, for the dataset id: the hash of the model's files; for an endpoint its
        addresses, the model's name, and the identity of the files that are on this machine too.

        Raises:
            InputError: no such policy, a tokenizer without a chat template, a missing key.
        """
        ...

    def context(self) -> int | None:
        """Most tokens of a prompt and its response; None: unbounded, or the server checks it."""
        ...

    def open(self) -> tuple[Sampler, PreTrainedTokenizerBase | None]:
        """The sampler, and the policy's tokenizer unless only a server knows it.

        Raises:
            InputError: no such policy, a missing package, a missing key.
        """
        ...

    def open_in_training(self, training: Training) -> Sampler:
        """The sampler of a training: a `Follower` if `follows`.

        Raises:
            InputError: a missing package or key, a server that can't be reached or can't follow,
                sampling parameters under which vLLM gives no log-probabilities for a ratio.
        """
        ...


def local_identity(policy: PolicyConfig) -> list[str]:
    """`Engine.identity` of a policy whose files are on this machine."""
    path = resolve_policy(policy.path)
    render_chat(load_tokenizer(path, policy.trust_remote_code), [{"role": "user", "content": ""}])
    return [model_revision(path, policy.trust_remote_code)]


def require_ratios(sampling: SamplingConfig) -> None:
    """Raises InputError for sampling under which vLLM's log-probabilities make no ratio."""
    if not sampling.untruncated:
        raise InputError(
            "online.sampling: vLLM gives log-probabilities after top_p, top_k and greedy choice, "
            "which no ratio can be formed with; set top_p=1, top_k=0 and a temperature above 0, or "
            "train.sampler.engine=transformers"
        )
