"""The policy in training, as samplers with weights of their own get it (protocols.TrainedPolicy).

pipelines/training/online_tables.py gives it to the engines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .fused import token_logprobs
from .lora import adapter_weights, has_adapters, merged_weights
from .losses import Head
from .packing import PackedModel, pack
from .policy import Policy
from .protocols import PolicyInfo


@dataclass(frozen=True)
class Trained:
    """A `TrainedPolicy` whose weights are whole on this rank. packed: the policy's own model."""

    policy: Policy
    packed: PackedModel

    @property
    def info(self) -> PolicyInfo:
        return self.policy.info

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.policy.compute_dtype

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `TrainedPolicy`. Without adapters tensors of that type are the model's own."""
        model = self.policy.model
        state = model.state_dict()
        if not has_adapters(model):
            for name, tensor in state.items():
                yield name, tensor.detach().to(self.compute_dtype)
            return
        (settings,) = model.peft_config.values()
        for name in state:
            if ".lora_" in name:
                continue
            module, base, _ = name.rpartition(".base_layer.")
            own = [name, *(n for n in state if base and n.startswith(f"{module}.lora_"))]
            ((plain, merged),) = merged_weights({n: state[n] for n in own}, settings).items()
            yield plain, merged.to(self.compute_dtype)

    def adapters(self) -> dict[str, torch.Tensor] | None:
        """See `TrainedPolicy`."""
        if not has_adapters(self.policy.model):
            return None
        return adapter_weights(self.policy.model)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See `TrainedPolicy`."""
        return [self._logprobs(row) for row in rows]

    def _logprobs(self, row: Sequence[int]) -> np.ndarray:
        token_ids = torch.tensor(row[1:], device=self.policy.device)

        def score(states: torch.Tensor, head: Head) -> torch.Tensor:
            return token_logprobs(states, head, token_ids, torch.ones_like(token_ids).float())

        scores = self.packed(pack([row[:1]], [np.asarray(row[1:])]), score)
        return scores.double().cpu().numpy()
