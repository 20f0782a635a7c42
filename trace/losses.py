"""The objective of METHOD.md on a flat list of response tokens.

For a response y with routed set S_y, advantage A and B responses in the step:

    L = 1/B Σ_y 1/|y| [ Σ_{t∉S} g_t + (1 − λ/w0) Σ_{t∈S} g_t + λ Σ_{t∈S} KL_t ]

g_t is GRPO's clipped surrogate with clip-higher against the stored log-probabilities. The KL
term is METHOD.md's "mean over S_y, times |S_y|/|y|", which is the sum over S_y divided by |y|.
Everything is linear in per-token terms with weights 1/(B |y|), so gradients do not depend on how
a batch is cut into micro-batches.
"""

from dataclasses import dataclass

import torch

from ..schemas.configs import LossConfig
from ..schemas.labels import KlClip, Route


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch, response tokens of all its sequences one after another.

    logits: (tokens, vocab) of the student, divided by the sampling temperature, with gradient.
    token_ids: (tokens,) int64. old_logprobs: (tokens,) float32 under the sampling policy.
    advantage: (tokens,) float32. route: (tokens,) uint8 of Route.
    weight: (tokens,) float32, 1 / (B |y|).
    teacher_logits: (routed tokens, vocab), in the order of the tokens whose route is not GRPO, at
        the same temperature; None when λ is 0 or nothing is routed.
    reference_logprobs: (tokens,) of the sampled tokens under the base policy, at the same
        temperature; None without a KL to it.
    """

    logits: torch.Tensor
    token_ids: torch.Tensor
    old_logprobs: torch.Tensor
    advantage: torch.Tensor
    route: torch.Tensor
    weight: torch.Tensor
    teacher_logits: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar with gradient. sums: statistics to be added up over micro-batches."""

    loss: torch.Tensor
    sums: dict[str, float]


def routed_loss(
    inputs: LossInputs, kl_weight: float, grpo_weight: float, config: LossConfig
) -> LossOutput:
    """TRACE's objective (arXiv 2605.10194; METHOD.md, "Objective") for one micro-batch.

    kl_weight: λ_k; grpo_weight: 1 − λ_k / w0, the weight of GRPO on routed tokens.
    """
    log_p = _log_softmax(inputs.logits)  # (tokens, vocab)
    logprobs = log_p.gather(-1, inputs.token_ids[:, None]).squeeze(-1)  # (tokens,)
    surrogate, clipped = clipped_surrogate(
        logprobs, inputs.old_logprobs, inputs.advantage, config.clip_low, config.clip_high
    )
    routed = inputs.route != int(Route.GRPO)  # (tokens,)
    surrogate = torch.where(routed, grpo_weight * surrogate, surrogate)
    loss = (inputs.weight * surrogate).sum()
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)  # (tokens,)
        drift = logprobs - inputs.old_logprobs
        sums = {
            "tokens": float(len(logprobs)),
            "entropy": entropy.sum().item(),
            "ratio_clipped": clipped.sum().item(),
            "sampler_drift": drift.abs().sum().item(),
        }
    if kl_weight > 0 and inputs.teacher_logits is not None and routed.any():
        log_q = _log_softmax(inputs.teacher_logits.detach())  # (routed, vocab)
        kl, stats = routed_kl(log_p[routed], log_q, inputs.route[routed], config)
        loss = loss + kl_weight * (inputs.weight[routed] * kl).sum()
        sums |= stats
    if inputs.reference_logprobs is not None:
        kl = reference_kl(logprobs, inputs.reference_logprobs)
        loss = loss + config.reference_kl * (inputs.weight * kl).sum()
        sums["reference_kl"] = kl.sum().item()
    return LossOutput(loss, sums)


def reference_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(p‖base) per token, estimated from the sampled ones: r − log r − 1 with r = base / p.

    Source: GRPO (arXiv 2402.03300, eq. 4). Both (tokens,) log-probabilities; no gradient flows
    into `reference`.
    """
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


def sampled_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of sampled tokens: (tokens,) from (tokens, vocab) logits."""
    return _log_softmax(logits).gather(-1, token_ids[:, None]).squeeze(-1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: bfloat16 would round probabilities to three digits."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


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


def routed_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, route: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """Per-token KL in each token's direction, pointwise clipped: (routed,) and statistics.

    log_p, log_q: (routed, vocab) student's and teacher's log-probabilities; no gradient flows
    into log_q. FKL is KL(q‖p), RKL is KL(p‖q).
    """
    forward = (route == int(Route.FKL))[:, None]
    log_ratio = log_q - log_p
    terms = torch.where(forward, log_q.exp() * log_ratio, -log_p.exp() * log_ratio)
    with torch.no_grad():
        exact = terms.sum(-1)
        stats = {}
        for name, kind in (("fkl", Route.FKL), ("rkl", Route.RKL)):
            stats[f"{name}_tokens"] = (route == int(kind)).sum().item()
            stats[f"{name}_kl"] = exact[route == int(kind)].sum().item()
    kl, clipped = clip_kl(terms, config.kl_clip, config.kl_clip_value)
    stats["kl_clipped"] = clipped.sum().item()
    return kl, stats


def clip_kl(terms: torch.Tensor, form: KlClip, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum (tokens, vocab) KL terms to (tokens,) with the pointwise clip of METHOD.md.

    entry_above clamps each vocabulary entry's term from above, entry_symmetric on both sides,
    token the per-token sum. No gradient flows where a clip binds. Also returns (tokens,) whether
    it binds anywhere.
    """
    if form is KlClip.ENTRY_ABOVE:
        return terms.clamp(max=bound).sum(-1), (terms > bound).any(-1)
    if form is KlClip.ENTRY_SYMMETRIC:
        return terms.clamp(-bound, bound).sum(-1), (terms.abs() > bound).any(-1)
    total = terms.sum(-1)
    if form is KlClip.TOKEN:
        return total.clamp(max=bound), total > bound
    return total, torch.zeros_like(total, dtype=torch.bool)
