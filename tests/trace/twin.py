"""The routed objective in full logits, token by token, by PyTorch's autograd, and random cases.

The reference of both implementations of the loss: test_fused.py and triton/cases.py compare them
with it in float64.
"""

from dataclasses import dataclass, replace

import torch

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import FLOOR, Head, LossInputs, LossOutput


@dataclass(frozen=True)
class Case:
    """A micro-batch and two heads; teacher_hidden has one row per routed token, in order."""

    hidden: torch.Tensor
    head: Head
    inputs: LossInputs
    teacher_hidden: torch.Tensor
    teacher_head: Head

    def to(
        self, states: torch.dtype, device: str = "cpu", weights: torch.dtype | None = None
    ) -> "Case":
        """The same values, rounded to a type of states and weights, with fresh gradients."""
        wide = torch.promote_types(states, torch.float32)

        def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if tensor is None:
                return None
            exact = tensor if not tensor.is_floating_point() else tensor.to(states).to(dtype)
            return exact.detach().to(device).requires_grad_(tensor.requires_grad)

        def head(one: Head) -> Head:
            weight = cast(one.weight, weights or states)
            assert weight is not None
            return Head(weight, cast(one.bias, weights or states), one.softcap)

        inputs = {
            name: cast(x, wide) for name, x in vars(self.inputs).items() if torch.is_tensor(x)
        }
        return Case(
            cast(self.hidden, states),  # type: ignore[arg-type]
            head(self.head),
            replace(self.inputs, **inputs),  # type: ignore[arg-type]
            cast(self.teacher_hidden, states),  # type: ignore[arg-type]
            head(self.teacher_head),
        )

    @property
    def variables(self) -> dict[str, torch.Tensor]:
        """The tensors that get gradients."""
        named = {"hidden": self.hidden, "weight": self.head.weight, "bias": self.head.bias}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}


def made_case(
    routes: list[int],
    seed: int = 0,
    vocab: int = 7,
    width: int = 4,
    bias: bool = False,
    softcap: float | None = None,
    temperature: float | None = None,
    log_ratio: float | None = None,
    advantage: float | None = None,
    scale: float = 1.0,
    masked: tuple[float, float] = (0.0, 0.0),
) -> Case:
    """Random float64 values; log_ratio and advantage fix those of all tokens.

    masked: share of the entries whose bias is −∞, the student's and the teacher's.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, routed = len(routes), sum(map(bool, routes))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(masked: float) -> Head:
        weight, shift = scale * normal(vocab, width), normal(vocab) if bias else None
        if masked:
            out = torch.randperm(vocab, generator=generator)[: int(masked * vocab)]
            shift = torch.zeros(vocab).double() if shift is None else shift
            shift[out] = -torch.inf
        return Head(weight, shift, softcap)

    student, teacher, hidden = head(masked[0]), head(masked[1]), normal(tokens, width)
    heat = torch.full((tokens,), temperature or 1.0).double()
    if temperature is None:
        heat = 0.5 + torch.rand(tokens, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocab, (tokens,), generator=generator)
    own = shaped_log_softmax(hidden, student, heat).gather(1, ids[:, None]).squeeze(1)
    own = floored(own)
    for variable in (hidden, student.weight, student.bias):
        if variable is not None:
            variable.requires_grad_()
    inputs = LossInputs(
        token_ids=ids,
        old_logprobs=own - (0.3 * normal(tokens) if log_ratio is None else log_ratio),
        advantage=normal(tokens) if advantage is None else torch.full_like(own, advantage),
        weight=torch.rand(tokens, generator=generator, dtype=torch.float64),
        temperature=heat,
        route=torch.tensor(routes, dtype=torch.uint8),
        reference_logprobs=own + 0.3 * normal(tokens),
    )
    return Case(hidden, student, inputs, normal(routed, width), teacher)


def shaped_log_softmax(hidden: torch.Tensor, head: Head, heat: torch.Tensor) -> torch.Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / heat[:, None], -1)


def floored(log_p: torch.Tensor) -> torch.Tensor:
    """FLOOR, a constant, for −∞."""
    return torch.where(log_p == -torch.inf, FLOOR, log_p)


def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    return -(log_p.exp() * floored(log_p)).sum()


def twin(case: Case, config: LossConfig, lam: float, fade: float) -> LossOutput:
    """METHOD.md's objective with its baselines' options, one token after another."""
    x = case.inputs
    student = shaped_log_softmax(case.hidden, case.head, x.temperature)
    routed = x.route != 0
    teacher = iter(
        shaped_log_softmax(case.teacher_hidden, case.teacher_head, x.temperature[routed])
    )
    rows = []
    for t, log_p in enumerate(student):
        route, kl, exact, kl_clipped = Route(int(x.route[t])), 0.0, 0.0, False
        logprob, advantage, share = floored(log_p[x.token_ids[t]]), x.advantage[t], 1.0
        if route is not Route.GRPO:
            log_q = next(teacher)
            if lam > 0 and route is Route.REWEIGHT:
                taught = floored(log_q[x.token_ids[t]])
                log_evidence = torch.sign(advantage) * (taught - logprob.detach())
                eps = config.reweight_clip
                advantage = advantage * (1 - lam + lam * log_evidence.exp().clamp(1 - eps, 1 + eps))
            elif lam > 0:
                share = fade
                terms = divergence_terms(route, log_p, log_q, config.jsd_beta)
                exact, kl_clipped = terms.sum(), clipped(terms, config) != terms.sum()
                kl = torch.exp(-config.entropy_beta * entropy_of(log_q)) * clipped(terms, config)
        ratio = torch.exp(logprob - x.old_logprobs[t])
        if config.truncated_importance is None:
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            binds = bounded * advantage < ratio * advantage
        else:
            importance = ratio.detach().clamp(max=config.truncated_importance)
            gain = importance * advantage * torch.exp(logprob - logprob.detach())
            binds = ratio > config.truncated_importance
        loss = -share * gain * config.grpo + lam * kl
        to_base = torch.zeros(())
        if x.reference_logprobs is not None:
            log_r = x.reference_logprobs[t] - logprob
            to_base = log_r.exp() - log_r - 1
            loss = loss + config.reference_kl * to_base
        entropy = entropy_of(log_p)
        rows.append((x.weight[t] * loss, logprob, entropy, binds, exact, kl_clipped, to_base))
    loss, *statistics = (
        torch.stack([torch.as_tensor(v).double() for v in c]) for c in zip(*rows, strict=True)
    )
    return LossOutput(loss.sum(), *(column.detach() for column in statistics))


def divergence_terms(
    route: Route, log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> torch.Tensor:
    p, q, log_p, log_q = log_p.exp(), log_q.exp(), floored(log_p), floored(log_q)
    if route is Route.FKL:
        return q * (log_q - log_p)
    if route is Route.RKL:
        return p * (log_p - log_q)
    m = beta * q + (1 - beta) * p
    log_m = torch.log(torch.where(m > 0, m, 1.0))
    return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)


def clipped(terms: torch.Tensor, config: LossConfig) -> torch.Tensor:
    bound = config.kl_clip_value
    if config.kl_clip == KlClip.ENTRY_ABOVE:
        return terms.clamp(max=bound).sum()
    if config.kl_clip == KlClip.ENTRY_SYMMETRIC:
        return terms.clamp(-bound, bound).sum()
    return terms.sum().clamp(max=bound) if config.kl_clip == KlClip.TOKEN else terms.sum()


def ours(case: Case, config: LossConfig, lam: float, fade: float) -> LossOutput:
    taught = (case.teacher_hidden, case.teacher_head) if lam > 0 else (None, None)
    return routed_loss(case.hidden, case.head, case.inputs, config, lam, fade, *taught)


def gradients(case: Case, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(case.variables.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(case.variables.items(), found, strict=True)
    }
