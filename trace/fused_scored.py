"""A chunk's rows with scores in the teacher's place, in the Triton path.

fused_triton.py launches its two kernels between these steps; top_k.py has the divergence. The
logits of the scores' tokens are gathered, (count, k), and their slopes are scattered back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..schemas.labels import Route, Signal
from .fused_call import Call, floored, wide
from .losses import FLOOR, divergence
from .top_k import Support, distinct, logit_slopes, masses, with_rest
from .transfer import to_device


class ScoredRows:
    """The routed tokens of a chunk: tokens first … of the micro-batch, rows base … of the scores.

    logits: (rows, vocab) of the chunk, in their own type. heat, lse: (tokens,). taught: (rows,)
    bool, in the host's memory.
    """

    def __init__(
        self, call: Call, logits: torch.Tensor, heat: torch.Tensor, lse: torch.Tensor,
        taught: np.ndarray, first: int, base: int,
    ) -> None:  # fmt: skip
        scores = call.inputs.scores
        assert scores is not None
        self.call, self.logits, self.first = call, logits, first
        at = to_device(torch.from_numpy(np.flatnonzero(taught)), logits.device)
        self.tokens, self.rows = at + first, at[:, None]  # (count,), (count, 1)
        part = slice(base, base + len(at))
        kind = wide(heat)
        self.own_q = scores.logprobs[part].to(kind)
        self.rest_q = scores.tail[part].to(kind)
        self.sampled = None if scores.sampled is None else scores.sampled[part].to(kind)
        self.token_ids, self.real = distinct(scores.token_ids[part], self.own_q)
        self.heat, self.lse = heat[self.tokens, None], lse[self.tokens, None]
        self.held = logits[self.rows, self.token_ids]  # (count, k)
        self.diverges = call.inputs.route[self.tokens] != Route.REWEIGHT

    @contextmanager
    def without_support(self) -> Iterator[tuple]:
        """With −∞ at the scores' tokens: arguments of `statistics` for the log-sum of the rest."""
        count = len(self.call.inputs.route)
        own_rows = torch.full((count,), -1, device=self.logits.device)
        own_rows[self.tokens] = self.tokens
        rest = torch.zeros(3, count, dtype=self.heat.dtype, device=self.logits.device)
        self.logits[self.rows, self.token_ids] = -torch.inf
        yield own_rows, rest[0], (rest[1], rest[2])
        self.logits[self.rows, self.token_ids] = self.held

    def diverge(
        self, rest_lse: torch.Tensor, value: torch.Tensor, taught_logprobs: torch.Tensor,
        teacher_entropy: torch.Tensor, out: dict[str, torch.Tensor],
    ) -> None:  # fmt: skip
        """Fill the divergence's statistics of these tokens; rest_lse: (tokens,)."""
        head, config = self.call.head, self.call.config
        z = self.held.to(self.heat.dtype)
        if head.bias is not None:
            z = z + head.bias[self.token_ids].to(z.dtype)
        self.chain = self.heat  # d logits after the temperature / d raw logits, (count, k)
        if head.softcap is not None:
            share = torch.tanh(z / head.softcap)
            z, self.chain = head.softcap * share, self.heat * (1 - share.square())
        own_p = (z * self.heat - self.lse).masked_fill(~self.real, -torch.inf)
        rest_p = rest_lse[self.tokens] - self.lse[:, 0]
        support = Support(
            self.token_ids, self.real, with_rest(own_p, rest_p), with_rest(self.own_q, self.rest_q)
        )
        self.p, q = masses(support)
        if Signal.TEACHER_ENTROPY in self.call.reads:
            teacher_entropy[self.tokens] = -(q * support.log_q).sum(-1)
        if self.sampled is not None:
            taught_logprobs[self.tokens] = floored(self.sampled)
        limited, exact, clipped, self.slope = divergence(
            Route.FKL, self.p, support.log_p, q, support.log_q.clone(), config
        )
        self.slope.masked_fill_(support.log_p == FLOOR, 0.0)  # the floor is a constant
        for column, found in ((value, limited), (out["kl"], exact), (out["kl_clipped"], clipped)):
            column[self.tokens] = torch.where(self.diverges, found.to(column.dtype), 0.0)

    def pull(
        self, lift: torch.Tensor, kl_lift: torch.Tensor, pulls: torch.Tensor, logprobs: torch.Tensor
    ) -> None:
        """Fill `pulls` for `gradient`, and compute the slopes that replace its own; (tokens,)."""
        own_lift = lift[self.tokens].masked_fill(logprobs[self.tokens] == FLOOR, 0.0)
        own, pull = logit_slopes(self.real, self.p, self.slope, own_lift, kl_lift[self.tokens])
        pulls[self.tokens] = pull - own_lift
        # An entry without a token repeats the first one, so it is the sampled token with it.
        sampled = self.token_ids == self.call.inputs.token_ids[self.tokens, None]
        self.own = (own + torch.where(sampled, own_lift[:, None], 0.0)) * self.chain

    def write(self, slopes: torch.Tensor) -> None:
        """Overwrite the slopes (rows, …) of the scores' tokens."""
        slopes[self.rows, self.token_ids] = self.own.to(slopes.dtype)
