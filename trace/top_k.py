"""Divergences over some entries of the vocabulary and one for all others.

A teacher's scores (`losses.Scores`) name k tokens per position, `loss.top_k` the student's k
likeliest: its support. The other tokens count as one, the rest, so both sides stay distributions,
of k + 1 entries, and the divergence is at most the exact one. Its gradient in the logits has no
dense term of the teacher: a factor of p for each row's rest, and k values of its own.
"""

from typing import NamedTuple

import torch

from .losses import FLOOR

_TINY = 1e-37  # a rest with less has no gradient: its share of the rest's slope would overflow


class Support(NamedTuple):
    """token_ids: (rows, k) int64; log_p, log_q: (rows, k + 1), the rest last, FLOOR for −∞.

    real: (rows, k) bool; an entry without a token repeats the first one's id and has no mass.
    """

    token_ids: torch.Tensor
    real: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor


def distinct(token_ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores' ids with the first one where an entry has no token, and where one has; (rows, k)."""
    real = logprobs > -torch.inf
    return torch.where(real, token_ids, token_ids[:, :1]), real


def with_rest(logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(rows, k + 1): log-probabilities (rows, k) and the rest's (rows,), FLOOR for −∞."""
    both = torch.cat((logprobs, rest[:, None].to(logprobs.dtype)), -1)
    return torch.nan_to_num(both, nan=torch.nan, posinf=torch.inf, neginf=FLOOR)


def masses(support: Support) -> tuple[torch.Tensor, torch.Tensor]:
    """p and q of the k + 1 entries, exactly 0 where the logarithm is FLOOR."""
    p, q = (torch.exp(x).masked_fill(x == FLOOR, 0.0) for x in (support.log_p, support.log_q))
    return p, q


def logit_slopes(
    real: torch.Tensor,
    p: torch.Tensor,
    slope: torch.Tensor,
    lift: torch.Tensor,
    kl_lift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d logits of the support, (rows, k), and the rest's as a factor of −p, (rows,).

    real: see Support. p, slope: (rows, k + 1), see losses.DIVERGENCES. lift: slope of the loss in
    log p(y), (rows,), whose own entry is not added; kl_lift: the divergence's weight, (rows,). An
    entry of the rest has its share p_v / p_R of the rest's slope.
    """
    pull = lift + kl_lift * slope.sum(-1)
    rest = torch.where(p[:, -1] > _TINY, slope[:, -1] / p[:, -1].clamp(min=_TINY), 0.0)
    own = kl_lift[:, None] * slope[:, :-1] - pull[:, None] * p[:, :-1]
    # A repeated token is written twice, with one value.
    return torch.where(real, own, own[:, :1]), pull - kl_lift * rest
