"""One step of a preset on a routed table by hand, and the closed forms of its gradients.

At ratio 1 and weight 1 a token's gradient in its logits is one of, or a mixture of:
GRPO −A (onehot − p), forward KL p − q, reverse KL p (log p/q − KL(p‖q)), and at β = ½ the
Jensen-Shannon divergence ½ p (log p/m − KL(p‖m)) with m between p and q.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.labels import DiagnosticType
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.gates import Limits
from trace_opd.trace.losses import Head, LossInputs
from trace_opd.trace.schedule import grpo_weight, kl_weight

# Nine tokens each, the end token included; α = 1/4 of them is two.
TOKENS, VOCAB = 9, 5
RIGHT = {"text": "ab\ncd\nef", "correct": True, "label": DiagnosticType.COUNTING, "marked": ([1],)}
WRONG = {"text": "AB\nCD\nEF", "correct": False, "label": DiagnosticType.SETUP, "marked": ([0],)}


@dataclass(frozen=True)
class Response:
    """One row of a routed table: the loss's gradient and the parts of the closed forms."""

    gradient: torch.Tensor  # (tokens, vocab)
    routed: list[int]
    p: torch.Tensor  # (tokens, vocab)
    q: torch.Tensor  # (tokens, vocab)
    onehot: torch.Tensor  # (tokens, vocab)
    advantage: float
    contrast: torch.Tensor  # (tokens,), log-probabilities

    @property
    def grpo(self) -> torch.Tensor:
        return -self.advantage * (self.onehot - self.p)

    @property
    def forward_kl(self) -> torch.Tensor:
        return self.p - self.q

    @property
    def reverse_kl(self) -> torch.Tensor:
        return pull(self.p, self.q)

    @property
    def jsd(self) -> torch.Tensor:
        return pull(self.p, (self.p + self.q) / 2) / 2

    def clipped_forward_kl(self, bound: float) -> torch.Tensor:
        """Of Σ_v min(q_v log(q_v / p_v), bound): Q p − q on the entries below it, Q their share."""
        active = self.q * (self.q / self.p).log() <= bound
        kept = self.q * active
        return kept.sum(-1, keepdim=True) * self.p - kept

    def of(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The sampled tokens' probabilities, (tokens,)."""
        return probabilities[self.onehot.bool()]

    @property
    def gap(self) -> torch.Tensor:
        """log q(y) − log p(y), (tokens,)."""
        return self.of(self.q).log() - self.of(self.p).log()

    @property
    def factors(self) -> torch.Tensor:
        """What the advantage was multiplied by, (tokens,), of a gradient that is GRPO's scaled."""
        factors = (self.gradient * self.grpo).sum(-1) / (self.grpo**2).sum(-1)
        torch.testing.assert_close(self.gradient, factors[:, None] * self.grpo)
        return factors


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Of distributions (tokens, vocab), nats, (tokens,)."""
    return -torch.special.xlogy(p, p).sum(-1)


def pull(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The gradient of KL(p‖target) in p's logits, with the target constant."""
    log_ratio = (p / target).log()
    return p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))


def gradients_of(
    row: dict,
    config: TrainConfig,
    step: int,
    sure: Sequence[int] = (),
    ratio: float = 1.0,
    limits: Limits | None = None,
    alike: bool = False,
) -> Response:
    """A row's gradient at a step, with random logits.

    sure: tokens at which the teacher is nearly certain. ratio: of every token, between trainer and
    sampler. limits: the step before's. alike: the contrast context moves the sampled tokens as the
    teacher's context does.
    """
    generator = torch.Generator().manual_seed(int(row["rollout_id"][1:]))
    logits = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    taught = logits + torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    taught[list(sure)] *= 60
    ids = torch.randint(VOCAB, (TOKENS,), generator=generator)
    one, route = torch.ones(TOKENS, dtype=torch.float64), torch.tensor(row["route"])
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(taught, -1)
    own = log_q.gather(1, ids[:, None]).squeeze(1)
    contrast = own if alike else own + torch.randn(TOKENS, generator=generator).double() / 50
    inputs = LossInputs(
        token_ids=ids,
        old_logprobs=log_p.gather(1, ids[:, None]).squeeze(1) - torch.tensor(ratio).log(),
        advantage=row["advantage"] * one,
        weight=one,
        temperature=one,
        route=route.to(torch.uint8),
        position=(torch.arange(TOKENS).double() + 0.5) / TOKENS,
        kl_scale=one * (config.loss.key_weight if row["correct"] else config.loss.error_weight),
    )
    if config.online.routing.contrast_context is not None:
        inputs = replace(inputs, contrast_logprobs=contrast)
    lam = kl_weight(step, config.schedule)
    fade = grpo_weight(lam, config.schedule)
    head = Head(torch.eye(VOCAB, dtype=torch.float64))
    teacher = (taught[route != 0], head) if lam > 0 else (None, None)
    variable = logits.requires_grad_()
    loss = routed_loss(
        variable,
        head,
        inputs,
        config.loss,
        lam,
        fade,
        *teacher,
        teacher_temperature=config.teacher.temperature,
        limits=limits,
    ).loss
    (gradient,) = torch.autograd.grad(loss, variable)
    onehot = torch.nn.functional.one_hot(ids, VOCAB).double()
    routed = torch.nonzero(route).squeeze(1).tolist()
    p, q = log_p.detach().exp(), log_q.exp()
    return Response(gradient, routed, p, q, onehot, row["advantage"], contrast)
