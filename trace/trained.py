"""The policy in training, as samplers get it: a `protocols.TrainedPolicy`, or a whole copy.

pipelines/training/online_tables.py gives it to the engines. The student may be sharded
over ranks, so every rank calls each method; tensors become whole one at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .fused import token_logprobs
from .lora import adapter_weights, plain_weights
from .losses import Head
from .packing import PackedModel, pack
from .policy import Policy
from .protocols import PolicyInfo
from .sharding import from_module, frozen_types, place_whole, remove_weights, reshard


@dataclass(frozen=True)
class Trained:
    """See `TrainedPolicy`. packed: the policy's model as the trainer holds it; fp32_logits: as in
    LossConfig.
    """

    policy: Policy
    packed: PackedModel
    fp32_logits: bool = False

    @property
    def info(self) -> PolicyInfo:
        return self.policy.info

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.policy.compute_dtype

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `TrainedPolicy`. Tied weights have each of their names."""
        for name, whole in plain_weights(self.policy.model):
            yield name, whole.to(self.compute_dtype)

    def adapters(self) -> dict[str, torch.Tensor] | None:
        """See `TrainedPolicy`."""
        return adapter_weights(self.policy.model)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See `TrainedPolicy`."""
        device = self.policy.device
        following = [np.asarray(row[1:]) for row in rows]
        ids = torch.from_numpy(np.concatenate(following)).to(device)

        def score(states: torch.Tensor, head: Head) -> torch.Tensor:
            heat = torch.ones(len(ids), device=device)
            return token_logprobs(states, head, ids, heat, self.fp32_logits)

        packed = pack([row[:1] for row in rows], following)
        scores = self.packed(packed, score).double().cpu().numpy()
        reshard(self.packed)
        return np.split(scores, np.cumsum([len(row) for row in following])[:-1])


class SamplingCopy:
    """A whole copy of a sharded student in its compute type, which exists while it samples.

    policy: for a sampler in this process.
    """

    def __init__(self, policy: Policy, model: Any) -> None:
        """model: a skeleton of the policy's (sharding.py)."""
        self._trained = policy
        self.policy = Policy(
            model, policy.tokenizer, policy.info, policy.compute_dtype, policy.device
        )

    def gather(self, student: PackedModel) -> None:
        """Copy the student's current weights and identity; every rank has to call."""
        packed = PackedModel(self.policy.model)  # names its parameters as the student does
        stored = frozen_types(self.policy.compute_dtype)
        place_whole(packed, from_module(student), stored, self.policy.device)
        self.policy.info = self._trained.info

    def free(self) -> None:
        """Drop the weights until the next `gather`."""
        remove_weights(self.policy.model)
