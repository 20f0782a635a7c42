"""The part of the objective that depends on the sampled tokens' log-probabilities alone.

GRPO's term and its relatives, the KL to the base policy, and the advantage of the action reweight.
The two implementations of the loss (fused_torch.py, fused_triton.py) call `policy_loss` and
`reweighted_advantage` with the statistics of a chunk; nothing here sees a vocabulary.
"""

import torch

from ..schemas.configs import LossConfig
from .losses import LossInputs


def policy_terms(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantage: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's term per token, differentiable in `logprobs`, and whether its bound binds; (tokens,).

    By default this is the clipped surrogate. With `truncated_importance` the trainer's own policy
    is
    the proximal policy: its ratio is 1 and only carries the gradient, and the importance weight
    between sampler and trainer is capped (truncated importance sampling).
    """
    if config.truncated_importance is None:
        return clipped_surrogate(
            logprobs, old_logprobs, advantage, config.clip_low, config.clip_high
        )
    importance = torch.exp(logprobs.detach() - old_logprobs)
    ratio = torch.exp(logprobs - logprobs.detach())
    cap = config.truncated_importance
    return -importance.clamp(max=cap) * ratio * advantage, importance > cap


def policy_loss(
    logprobs: torch.Tensor,
    advantage: torch.Tensor,
    grpo_weight: torch.Tensor,
    inputs: LossInputs,
    rows: torch.Tensor | slice,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The part of the loss that depends on the sampled tokens' log-probabilities alone.

    logprobs, advantage, grpo_weight: (rows,); rows: their places in `inputs`, (rows,) int64.
    Returns loss, its slope in `logprobs`, whether GRPO's bound binds, and the KL to the base policy
    in nats (0 without one), all (rows,) without gradient.
    """
    with torch.enable_grad():
        variable = logprobs.detach().requires_grad_()
        terms, bound = policy_terms(variable, inputs.old_logprobs[rows], advantage, config)
        losses, kl = (grpo_weight if config.grpo else 0.0) * terms, torch.zeros_like(logprobs)
        if inputs.reference_logprobs is not None:
            kl = reference_kl(variable, inputs.reference_logprobs[rows])
            losses = losses + config.reference_kl * inputs.weight[rows] * kl
        (slope,) = torch.autograd.grad(losses.sum(), variable)
    return losses.detach(), slope, bound, kl.detach()


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A) and whether the clip binds, both (tokens,).

    Source: PPO (arXiv 1707.06347, eq. 7) with DAPO's clip-higher (arXiv 2503.14476, eq. 8).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    unclipped_gain, clipped_gain = ratio * advantage, bounded * advantage
    return -torch.minimum(unclipped_gain, clipped_gain), clipped_gain < unclipped_gain


def reference_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(p‖base) estimated at each sampled token: r − log r − 1 with r = base / p.

    Source: GRPO (arXiv 2402.03300, eq. 4). Both (tokens,) log-probabilities; no gradient flows
    into `reference`.
    """
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


def reweighted_advantage(
    advantage: torch.Tensor,
    logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    kl_weight: float,
    clip: float,
) -> torch.Tensor:
    """A · (1 − λ + λ · clip((q/p)^sign(A), 1 ± ε)) on the sampled tokens, (tokens,), no gradient.

    The reward sets the direction of the update, the privileged teacher its magnitude (RLSD, arXiv
    2604.03128; METHOD.md, "Baselines").
    """
    evidence = torch.exp(torch.sign(advantage) * (teacher_logprobs - logprobs))
    return advantage * (1 - kl_weight + kl_weight * evidence.clamp(1 - clip, 1 + clip))
