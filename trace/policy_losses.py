"""The part of the objective that depends on the sampled tokens' log-probabilities alone.

GRPO's term and its relatives, the KL to the base policy, and the advantage of the action reweight.
The two implementations of the loss (fused_torch.py, fused_triton.py) call `policy_loss` and
`reweighted_advantage` with the statistics of a chunk; nothing here sees a vocabulary.

A new form is one function here, with its name in POLICY_LOSSES or REWEIGHTS and in the config.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..schemas.configs import LossConfig
from .losses import LossInputs

# Largest log-ratio in sapo: exp of more overflows, and its gradient would be 0 · ∞.
_MOST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class SampledTokens:
    """What a form of GRPO's term reads of some tokens, (tokens,) each.

    logprobs: of the policy, with gradient. old_logprobs: of the sampling policy. sequence_logratio:
    mean of log p − log p_old over the token's sequence, without gradient; None if no form needs it.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantage: torch.Tensor
    sequence_logratio: torch.Tensor | None = None


# (tokens, config) -> terms with gradient in `logprobs`, and whether a bound binds, (tokens,) each.
PolicyLoss = Callable[[SampledTokens, LossConfig], tuple[torch.Tensor, torch.Tensor]]


def grpo(tokens: SampledTokens, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped ratio of each token.

    With `truncated_importance` the trainer's own policy is the proximal policy: its ratio is 1 and
    only carries the gradient, and the importance weight between sampler and trainer is capped
    (truncated importance sampling).
    """
    logprobs, old_logprobs, advantage = tokens.logprobs, tokens.old_logprobs, tokens.advantage
    if config.truncated_importance is None:
        return clipped_surrogate(
            logprobs, old_logprobs, advantage, config.clip_low, config.clip_high
        )
    importance = torch.exp(logprobs.detach() - old_logprobs)
    ratio = torch.exp(logprobs - logprobs.detach())
    cap = config.truncated_importance
    return -importance.clamp(max=cap) * ratio * advantage, importance > cap


def gspo(tokens: SampledTokens, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped ratio of each sequence, (p / p_old)^(1 / |y|); every token carries a gradient.

    log s_t = sg(mean of log p − log p_old) + log p − sg(log p): GSPO-token, whose gradient is
    GSPO's because a sequence's tokens share their advantage.
    Source: GSPO, arXiv 2507.18071, section 4.3.
    """
    if tokens.sequence_logratio is None:
        raise ValueError("loss.policy gspo needs the mean log-ratio of each token's sequence")
    # The surrogate sees log s_t − 0.
    log_ratio = tokens.sequence_logratio + tokens.logprobs - tokens.logprobs.detach()
    zero = torch.zeros_like(log_ratio)
    return clipped_surrogate(log_ratio, zero, tokens.advantage, config.clip_low, config.clip_high)


def cispo(tokens: SampledTokens, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """−sg(clip(r, 1 − ε_low, 1 + ε_high)) A log p: a clipped token keeps its gradient.

    ε_low of 1 or more is no lower bound. TRL's epsilon_high is the cap itself, 1 + ε_high here.
    Source: MiniMax-M1, arXiv 2506.13585, CISPO, as verl implements it.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.old_logprobs)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -bounded * tokens.advantage * tokens.logprobs, bounded != ratio


def sapo(tokens: SampledTokens, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """−A (4 / τ) σ(τ (r − 1)): the gradient fades smoothly away from ratio 1, where it is GRPO's.

    τ is sapo_tau_positive where A > 0, else sapo_tau_negative. Nothing is clipped.
    Source: SAPO, arXiv 2511.20347, as TRL and verl implement it.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    ratio = torch.exp(log_ratio.clamp(max=_MOST_LOG_RATIO))
    positive = tokens.advantage > 0
    tau = torch.full_like(ratio, config.sapo_tau_negative)
    tau = tau.masked_fill(positive, config.sapo_tau_positive)
    gain = 4 / tau * torch.sigmoid(tau * (ratio - 1))
    return -tokens.advantage * gain, torch.zeros_like(positive)


POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": grpo, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def policy_loss(
    logprobs: torch.Tensor,
    advantage: torch.Tensor,
    grpo_weight: torch.Tensor,
    inputs: LossInputs,
    rows: torch.Tensor | slice,
    config: LossConfig,
    sequence_logratio: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The part of the loss that depends on the sampled tokens' log-probabilities alone.

    logprobs, advantage, grpo_weight: (rows,); rows: their places in `inputs`, (rows,) int64;
    sequence_logratio: (rows,), see `SampledTokens`, for policy gspo.
    Returns loss, its slope in `logprobs`, whether GRPO's bound binds, and the KL to the base policy
    in nats (0 without one), all (rows,) without gradient.
    """
    with torch.enable_grad():
        variable = logprobs.detach().requires_grad_()
        tokens = SampledTokens(variable, inputs.old_logprobs[rows], advantage, sequence_logratio)
        terms, bound = POLICY_LOSSES[config.policy](tokens, config)
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


# λ, or λ times each token's factor.
Strength = float | torch.Tensor
# (advantage A, gap D in nats, strength λ, config) -> modulated advantage, (tokens,) each.
Reweight = Callable[[torch.Tensor, torch.Tensor, Strength, LossConfig], torch.Tensor]


def times_ratio(
    advantage: torch.Tensor, gap: torch.Tensor, strength: Strength, config: LossConfig
) -> torch.Tensor:
    """A · (1 − λ + λ · clip(exp(sign(A) D), 1 ± ε)).

    The reward sets the direction of the update, the privileged teacher its magnitude (RLSD, arXiv
    2604.03128; METHOD.md, "Baselines").
    """
    clip = config.reweight_clip
    evidence = torch.exp(torch.sign(advantage) * gap)
    return advantage * (1 - strength + strength * evidence.clamp(1 - clip, 1 + clip))


def times_inverse(
    advantage: torch.Tensor, gap: torch.Tensor, strength: Strength, config: LossConfig
) -> torch.Tensor:
    """The same with −D: a token that the teacher finds unlikely is reinforced more.

    Source: RLRT, arXiv 2605.10781.
    """
    return times_ratio(advantage, -gap, strength, config)


def plus_bounded(
    advantage: torch.Tensor, gap: torch.Tensor, strength: Strength, config: LossConfig
) -> torch.Tensor:
    """A + λ tanh(D / scale), at most down to 0: the reward keeps the sign. 0 where A is 0.

    Changes of `reweight_threshold` or less are left out. Source: RLCSD, arXiv 2606.11709.
    """
    change = strength * torch.tanh(gap / config.reweight_scale)
    changed = advantage + change * (change.abs() > config.reweight_threshold)
    sign = torch.sign(advantage)
    return sign * (sign * changed).clamp(min=0)


def times_one_sided(
    advantage: torch.Tensor, gap: torch.Tensor, strength: Strength, config: LossConfig
) -> torch.Tensor:
    """A · (1 + λ max(0, sign(A) clip(D, ± ε) − threshold)): nothing is weakened at λ ≥ 0.

    Source: AMR-SD, arXiv 2605.18529.
    """
    clip = config.reweight_clip
    evidence = torch.sign(advantage) * gap.clamp(-clip, clip) - config.reweight_threshold
    return advantage * (1 + strength * evidence.clamp(min=0))


REWEIGHTS: dict[str, Reweight] = {
    "ratio": times_ratio,
    "inverse": times_inverse,
    "bounded": plus_bounded,
    "one_sided": times_one_sided,
}


def reweighted_advantage(
    advantage: torch.Tensor,
    logprobs: torch.Tensor,
    taught: torch.Tensor,
    kl_weight: float,
    config: LossConfig,
    factor: torch.Tensor | None = None,
    contrast: torch.Tensor | None = None,
) -> torch.Tensor:
    """The advantage of the action reweight on the sampled tokens, (tokens,), a constant.

    logprobs, taught: log-probabilities of the student and of the teacher, nats. The gap D is
    taught − logprobs, or taught − contrast, the teacher's under the contrast context. kl_weight: λ;
    factor: multiplies it (`loss.key_weight`, `loss.error_weight`, gates); None is 1.
    """
    with torch.no_grad():
        gap = taught - (logprobs if contrast is None else contrast)
        strength = kl_weight if factor is None else kl_weight * factor
        return REWEIGHTS[config.reweight](advantage, gap, strength, config)
