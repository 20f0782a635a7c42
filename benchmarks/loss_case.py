"""The case that loss.py's implementations share, and what each must agree with."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import torch

from trace_opd.schemas.labels import Route

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
KL_WEIGHT, GRPO_WEIGHT = 0.25, 0.5  # λ_k halfway down from w0 = 0.5
# Of each of the two responses that an implementation is checked on.
CHECKED_TOKENS = 32
# One token in ROUTED_EVERY is routed, in runs of SPAN_TOKENS.
ROUTED_EVERY, SPAN_TOKENS = 4, 16
LOGIT_DEVIATION = 1.2


@dataclass(frozen=True)
class Case:
    """T tokens in B responses of equal length, R of them routed.

    Float tensors have the case's dtype, except old_logprobs, advantage and weight (float32).
    """

    hidden: torch.Tensor  # (T, H), with gradient
    head: torch.Tensor  # (V, H), with gradient
    teacher_hidden: torch.Tensor  # (T, H)
    teacher_head: torch.Tensor  # (V, H)
    token_ids: torch.Tensor  # (T,) int64
    old_logprobs: torch.Tensor  # (T,)
    advantage: torch.Tensor  # (B,)
    route: torch.Tensor  # (T,) uint8
    host_route: np.ndarray  # the same
    routed_rows: torch.Tensor  # (R,) int64
    routed_teacher: torch.Tensor  # (R, H)
    weight: torch.Tensor  # (T,), GRPO's: w c_t

    @property
    def token_advantage(self) -> torch.Tensor:
        """(T,) float32."""
        return self.advantage.repeat_interleave(len(self.hidden) // len(self.advantage))


def make_case(
    responses: int,
    length: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    all_routed: bool = False,
) -> Case:
    """length: tokens of each response. The same arguments give the same numbers."""
    tokens = responses * length
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    states, head, teacher_head = (
        normal(tokens, hidden),
        normal(vocab, hidden),
        normal(vocab, hidden),
    )
    head *= LOGIT_DEVIATION / sqrt(hidden)
    # The teacher is the student a few steps ago.
    teacher_head.mul_(0.3 * LOGIT_DEVIATION / sqrt(hidden)).add_(head)
    teacher_states = states + 0.3 * normal(tokens, hidden)
    token_ids = torch.randint(vocab, (tokens,), generator=generator, device=device)
    # log Σ exp of Gaussian logits is close to log V + σ²/2, so ratios lie around 1, on both sides
    # of the clip, without a product over the vocabulary.
    chosen = torch.linalg.vecdot(states.float(), head[token_ids].float())
    old_logprobs = chosen - log(vocab) - LOGIT_DEVIATION**2 / 2 + 0.2 * normal(tokens).float()
    signs = 1.0 - 2.0 * (torch.arange(responses, device=device) % 2)
    position = torch.arange(tokens, device=device)
    routed = (position % (ROUTED_EVERY * SPAN_TOKENS) < SPAN_TOKENS) | all_routed
    route = torch.where(routed, int(Route.FKL), int(Route.GRPO)).to(torch.uint8)
    (rows,) = torch.nonzero(routed, as_tuple=True)
    return Case(
        hidden=states.requires_grad_(),
        head=head.requires_grad_(),
        teacher_hidden=teacher_states,
        teacher_head=teacher_head,
        token_ids=token_ids,
        old_logprobs=old_logprobs,
        advantage=signs * (1 + torch.rand(responses, generator=generator, device=device)),
        route=route,
        host_route=route.cpu().numpy(),
        routed_rows=rows,
        routed_teacher=teacher_states[rows],
        weight=torch.where(routed, GRPO_WEIGHT, 1.0) / tokens,
    )


def disagreement(
    run: Callable[[Case], torch.Tensor],
    exact: Callable[[Case], torch.Tensor],
    case: Case,
) -> float:
    """Largest difference between two implementations, `exact` in float32, in the loss and both
    gradients, as a share of the largest entry.
    """
    given = Case(
        **{
            field: value.detach().float() if _is_float(value) else value
            for field, value in vars(case).items()
        }
    )
    given.hidden.requires_grad_()
    given.head.requires_grad_()
    found, expected = (
        (function(own).detach().cpu(), own.hidden.grad, own.head.grad)
        for function, own in ((run, case), (exact, given))
    )
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


def _is_float(value: torch.Tensor | np.ndarray) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
