"""Arguments of one call of the loss, and the factors of a token that both implementations apply."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..schemas.configs import LossConfig
from ..schemas.labels import Signal
from .gates import Limits, gate_factors, signals_read
from .losses import FLOOR, Head, LossInputs

Rows = torch.Tensor | slice

# Bytes of a chunk's logits in fused_triton.py: 2,048 tokens of a vocabulary of 151,936 in bfloat16
# with a quarter routed. Here, because the plan counts it on machines without triton.
TRITON_BUFFER_BYTES = 768 << 20


@dataclass(frozen=True)
class Call:
    """Arguments of the autograd functions that are not differentiable tensors.

    sequence_logratio: (tokens,), see policy_losses.policy_loss.
    """

    inputs: LossInputs
    config: LossConfig
    kl_weight: float
    grpo_weight: float
    head: Head
    teacher_head: Head | None
    teacher_temperature: float | None = None
    limits: Limits | None = None
    sequence_logratio: torch.Tensor | None = None

    def routes(self, with_teacher: bool) -> np.ndarray:
        """Each token's route in the host's memory; GRPO's where no teacher teaches."""
        route = self.inputs.host_route
        if not with_teacher or self.kl_weight == 0:
            return np.zeros(len(self.inputs.route), np.uint8)
        return self.inputs.route.cpu().numpy() if route is None else route

    @property
    def reads(self) -> set[Signal]:
        """Signals of routed tokens that the loss needs."""
        beta = {Signal.TEACHER_ENTROPY} if self.config.entropy_beta else set()
        return signals_read(self.config.gates) | beta

    def gate(self, rows: Rows, signals: Mapping[Signal, torch.Tensor]) -> torch.Tensor | None:
        """The product of the gates of some routed tokens, (rows,); None without gates.

        signals: all but the position, (rows,) each.
        """
        if not self.config.gates:
            return None
        if self.inputs.position is not None:
            signals = {**signals, Signal.POSITION: self.inputs.position[rows]}
        return gate_factors(self.config.gates, signals, self.limits)

    def reweight_factor(self, rows: Rows, gate: torch.Tensor | None) -> torch.Tensor | None:
        """What multiplies λ in the action reweight, (rows,); None for 1."""
        scale = None if self.inputs.kl_scale is None else self.inputs.kl_scale[rows]
        if scale is None or gate is None:
            return gate if scale is None else scale
        return scale * gate

    def kl_factor(
        self, rows: Rows, gate: torch.Tensor | None, logprobs: torch.Tensor
    ) -> torch.Tensor | None:
        """What multiplies a divergence besides λ and the weight, (rows,); None for 1.

        logprobs: the policy's of the sampled tokens, (rows,). The importance weight is SDPO's
        (arXiv 2601.20802, as its code has it): p / p_old without gradient, bounded from above.
        """
        factor = self.reweight_factor(rows, gate)
        if self.config.importance_clip is None:
            return factor
        ratio = torch.exp(logprobs.detach() - self.inputs.old_logprobs[rows])
        ratio = ratio.clamp(max=self.config.importance_clip)
        return ratio if factor is None else factor * ratio

    def contrast(self, rows: Rows) -> torch.Tensor | None:
        """The teacher's log-probabilities under the contrast context, (rows,)."""
        logprobs = self.inputs.contrast_logprobs
        return None if logprobs is None else logprobs[rows]

    def ratio(self, rows: Rows) -> torch.Tensor | None:
        """The mean log-ratio of each token's sequence, (rows,)."""
        return None if self.sequence_logratio is None else self.sequence_logratio[rows]


def chunk_sizes(routed: np.ndarray, rows: int) -> list[int]:
    """Tokens of each chunk of at most `rows` rows of logits; a routed token has two.

    routed: (tokens,) bool. Chunks are even, because a short last one is inefficient.
    """
    costs = np.cumsum(1 + routed.astype(np.int64))
    if not len(costs):
        return []
    count = -(-costs[-1] // (rows - 1))  # a routed token may cross a border, hence rows − 1
    return np.bincount((costs - 1) * count // costs[-1], minlength=count).tolist()


def floored(logprobs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities with FLOOR instead of −∞."""
    return torch.nan_to_num(logprobs, nan=torch.nan, posinf=torch.inf, neginf=FLOOR, out=out)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """float32 at least: bfloat16 would round probabilities to three digits."""
    return torch.promote_types(tensor.dtype, torch.float32)
