"""The objective's terms per token, and the table of divergences.

fused.py calls these functions for blocks of tokens; trainer.py calls `token_weights`, sequences.py
builds LossInputs, and metrics.py names metrics after DIVERGENCES. For a response y with routed set
S_y, advantage A and B responses in the step (METHOD.md):

    L = Σ_y w_y [ Σ_{t∉S} g_t + (1 − λ/w0) Σ_{t∈S} g_t + λ Σ_{t∈S} KL_t ],   w_y = 1 / (B |y|)

g_t is GRPO's surrogate. METHOD.md's KL term, "mean over S_y, times |S_y|/|y|", equals the sum over
S_y divided by |y|. The loss is linear in per-token terms whose weights are global to the step, so
gradients do not depend on how a batch is cut into micro-batches or distributed over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ..schemas.configs import LossConfig
from ..schemas.labels import KlClip, Route

# log 0 where a formula needs a number: a masked entry's log-probability, in nats. A divergence that
# is infinite, because one of the two masks what the other allows, is finite with it, and so is
# exp(−FLOOR) in float32. It is a constant: no gradient flows through it.
FLOOR = -80.0


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap · tanh((h Wᵀ + b) / softcap).

    weight: (vocab, hidden); bias: (vocab,); softcap: None for plain logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def shape_(
        self, logits: torch.Tensor, temperature: torch.Tensor | float | None
    ) -> torch.Tensor:
        """Apply soft cap and temperature, (rows, 1) or one, to logits (rows, vocab), in place."""
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if temperature is None else logits.div_(temperature)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """d capped logits / d raw logits, (rows, vocab); None without a cap."""
        return 1 - (logits / self.softcap).tanh_().square_() if self.softcap else None

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same head with its weight in another type."""
        return replace(self, weight=self.weight.to(dtype))


@dataclass(frozen=True)
class LossInputs:
    """Response tokens of one micro-batch, one sequence after another; all (tokens,).

    token_ids: int64. old_logprobs: float32, under the sampling policy at `temperature`.
    advantage: float32. weight: float32, global to the step (`token_weights`). temperature:
    float32, divides the logits. route: uint8 of Route. Where no config needs them, None:
    reference_logprobs: float32 under the base policy; contrast_logprobs: float32, under the teacher
    with `routing.contrast_context`; position: float32, (t + 1/2) / tokens of the response;
    kl_scale: float32, sign and size of the KL (`loss.key_weight`, `loss.error_weight`); sequence:
    int64, the response's number, from 0; scores: in a teacher's place (`teacher.scores`).
    host_route: `route` in the host's memory, and heated: whether some temperature is not 1; the
    loss asks the device, and waits for it, where they are None.
    """

    token_ids: torch.Tensor
    old_logprobs: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    temperature: torch.Tensor
    route: torch.Tensor
    reference_logprobs: torch.Tensor | None = None
    contrast_logprobs: torch.Tensor | None = None
    position: torch.Tensor | None = None
    kl_scale: torch.Tensor | None = None
    sequence: torch.Tensor | None = None
    scores: "Scores | None" = None
    host_route: np.ndarray | None = None
    heated: bool | None = None


@dataclass(frozen=True)
class Scores:
    """A teacher's likeliest tokens, of the routed tokens in their order.

    token_ids: (routed, k) int64, distinct; logprobs: (routed, k) float32, nats; an entry without a
    token has −inf, never the first. tail: (routed,) float32, log of the mass of all other tokens,
    −inf for none. sampled: (routed,) float32, the response's token's, for the action reweight.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    tail: torch.Tensor
    sampled: torch.Tensor | None = None


class LossOutput(NamedTuple):
    """loss: scalar with gradient. The rest is (tokens,) float32 without one.

    logprobs and entropy: the student's, nats. teacher_entropy: of routed tokens where a gate or
    entropy_beta reads it, nats, 0 elsewhere. gate: the product of a routed token's gates where the
    config has some, 0 elsewhere. ratio_clipped, kl_clipped: 1 where a bound binds.
    kl: the exact divergence of routed tokens, nats, 0 elsewhere. reference_kl: nats.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    gate: torch.Tensor
    ratio_clipped: torch.Tensor
    kl: torch.Tensor
    kl_clipped: torch.Tensor
    reference_kl: torch.Tensor


def token_weights(lengths: Sequence[int], config: LossConfig) -> np.ndarray:
    """Weight of each response's tokens in the loss: (responses,) float32.

    sequence: 1 / (B |y|) (GRPO, arXiv 2402.03300, eq. 3); token: 1 / Σ|y| (DAPO, arXiv 2503.14476,
    eq. 8); constant: 1 / (B · constant_length) (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    sizes = np.maximum(np.asarray(lengths, dtype=np.float64), 1)
    if not len(sizes):
        return sizes.astype(np.float32)
    if config.aggregation == "sequence":
        weights = 1 / (len(sizes) * sizes)
    elif config.aggregation == "token":
        weights = np.full(len(sizes), 1 / sizes.sum())
    else:
        weights = np.full(len(sizes), 1 / (len(sizes) * config.constant_length))
    return weights.astype(np.float32)


def forward_kl(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q‖p)."""
    return log_q.sub_(log_p).mul_(q), -q


def reverse_kl(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p‖q)."""
    terms = log_q.sub_(log_p).mul_(p).neg_()
    return terms, p + terms


def jensen_shannon(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """β KL(q‖m) + (1 − β) KL(p‖m) with m = βq + (1 − β)p (GKD, arXiv 2306.13649, eq. 1)."""
    beta = config.jsd_beta
    log_m = torch.log(beta * q + (1 - beta) * p)
    slope = (1 - beta) * p * (log_p - log_m)
    terms = beta * q * (log_q - log_m) + slope
    # Entries where p and q both round to 0 give NaN and contribute nothing.
    return terms.nan_to_num_(0.0), slope.nan_to_num_(0.0)


# The formula of each divergence between teacher q and student p, all arguments (tokens, vocab):
# (p, log_p, q, log_q, config) -> (terms d_v, slope s_v), both (tokens, vocab). The divergence is
# D = Σ_v d_v, and s_v = p_v ∂D/∂p_v, so that its gradient in the student's logits is s − p Σ s.
# A formula may overwrite log_q. Routes in this table fade in GRPO and have metrics kl_<label>.
DIVERGENCES = {
    Route.FKL: forward_kl,
    Route.RKL: reverse_kl,
    Route.JSD: jensen_shannon,
}


def divergence(
    route: Route,
    p: torch.Tensor,
    log_p: torch.Tensor,
    q: torch.Tensor,
    log_q: torch.Tensor,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A routed token's divergence between teacher q and student p, all inputs (tokens, vocab).

    Returns the clipped value that the loss takes, the exact value, whether the clip binds, all
    (tokens,), and the clipped value's slope (see DIVERGENCES), (tokens, vocab). Overwrites log_q.
    """
    terms, slope = DIVERGENCES[route](p, log_p, q, log_q, config)
    exact = terms.sum(-1)
    value, kept = clip_kl(terms, exact, config.kl_clip, config.kl_clip_value)
    if kept is None:
        return value, exact, torch.zeros_like(exact, dtype=torch.bool), slope
    return value, exact, ~kept.all(-1), slope.mul_(kept)


def clip_kl(
    terms: torch.Tensor, exact: torch.Tensor, form: KlClip, bound: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum divergence terms (tokens, vocab) to (tokens,) under METHOD.md's clip; exact: without it.

    entry_above clamps each vocabulary entry's term from above, entry_symmetric on both sides,
    token the per-token sum. Also returns the mask where the clip does not bind, (tokens, vocab) or
    (tokens, 1): a term's own gradient flows only there. Through the softmax the logits of clipped
    entries get one of the other sign (arXiv 2609.38995, proposition 1; docs/decisions/kl-clip.md).
    None: the clip is off.
    """
    if form is KlClip.ENTRY_ABOVE:
        return terms.clamp(max=bound).sum(-1), terms <= bound
    if form is KlClip.ENTRY_SYMMETRIC:
        return terms.clamp(-bound, bound).sum(-1), terms.abs() <= bound
    if form is KlClip.TOKEN:
        return exact.clamp(max=bound), (exact <= bound)[:, None]
    return exact, None
