"""The routed objective in full logits, token by token, by PyTorch's autograd, and random cases.

The reference of both implementations of the loss: test_fused.py and triton/cases.py compare them
with it in float64.
"""

import math
from dataclasses import dataclass, replace

import torch

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.labels import KlClip, Route, Signal
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.gates import Limits
from trace_opd.trace.losses import FLOOR, Head, LossInputs, LossOutput, Scores


@dataclass(frozen=True)
class Case:
    """A micro-batch and two heads; teacher_hidden has one row per routed token, in order.

    teacher_temperature, limits: arguments of `routed_loss`.
    """

    hidden: torch.Tensor
    head: Head
    inputs: LossInputs
    teacher_hidden: torch.Tensor
    teacher_head: Head
    teacher_temperature: float | None = None
    limits: Limits | None = None

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
        scores = self.inputs.scores
        if scores is not None:
            named = {name: cast(x, wide) for name, x in vars(scores).items()}
            inputs["scores"] = Scores(**named)  # type: ignore[arg-type,assignment]
        return replace(
            self,
            hidden=cast(self.hidden, states),
            head=head(self.head),
            inputs=replace(self.inputs, **inputs),  # type: ignore[arg-type]
            teacher_hidden=cast(self.teacher_hidden, states),
            teacher_head=head(self.teacher_head),
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
    heat = x.temperature[routed]
    if case.teacher_temperature is not None:
        heat = torch.full_like(heat, case.teacher_temperature)
    teacher = iter(shaped_log_softmax(case.teacher_hidden, case.teacher_head, heat))
    sampled = floored(student.gather(1, x.token_ids[:, None]).squeeze(1)).detach()
    rows, taught = [], -1
    for t, log_p in enumerate(student):
        route, kl, exact, kl_clipped = Route(int(x.route[t])), 0.0, 0.0, False
        logprob, advantage, share = floored(log_p[x.token_ids[t]]), x.advantage[t], 1.0
        entropy, teacher_entropy, gate = entropy_of(log_p), 0.0, 0.0
        if route is not Route.GRPO:
            log_q, taught = next(teacher), taught + 1
        if route is not Route.GRPO and lam > 0:
            terms, factor = torch.zeros(()), 1.0
            if route is Route.REWEIGHT:
                taught_logprob, full = floored(log_q[x.token_ids[t]]), entropy_of(log_q)
            if x.scores is not None:
                one = Scores(*(column[taught] for column in vars(x.scores).values()))
                log_p_k, log_q_k = scored_entries(log_p, one)
                full = entropy_of(log_q_k)
                if one.sampled is not None:
                    taught_logprob = floored(one.sampled)
            elif route is not Route.REWEIGHT:
                full = entropy_of(log_q)
                log_p_k, log_q_k = support_entries(log_p, log_q, config.top_k)
            if route is not Route.REWEIGHT:
                share = fade
                terms = divergence_terms(route, log_p_k, log_q_k, config.jsd_beta)
                exact, kl_clipped = terms.sum(), clipped(terms, config) != terms.sum()
            if config.entropy_beta or any(g.of is Signal.TEACHER_ENTROPY for g in config.gates):
                teacher_entropy = full.detach()
            if x.kl_scale is not None:
                factor = factor * x.kl_scale[t]
            if config.gates:
                read = {
                    Signal.TEACHER_ENTROPY: float(full.detach()),
                    Signal.STUDENT_ENTROPY: float(entropy.detach()),
                    Signal.DIVERGENCE: float(torch.as_tensor(exact).detach()),
                    Signal.POSITION: 0.0 if x.position is None else float(x.position[t]),
                }
                gate = math.prod(
                    gate_of(gate, n, read, case.limits) for n, gate in enumerate(config.gates)
                )
                factor = factor * gate
            if route is Route.REWEIGHT:
                other = sampled[t] if x.contrast_logprobs is None else x.contrast_logprobs[t]
                gap = taught_logprob - other
                advantage = reweighted(advantage, gap, lam * factor, config)
            else:
                if config.importance_clip is not None:
                    ratio = torch.exp(sampled[t] - x.old_logprobs[t])
                    factor = factor * ratio.clamp(max=config.importance_clip)
                factor = factor * torch.exp(-config.entropy_beta * full.detach())
                kl = factor * clipped(terms, config)
        gain, binds = policy_gain(case, config, t, logprob, advantage, sampled)
        loss = -share * gain * config.grpo + lam * kl
        to_base = torch.zeros(())
        if x.reference_logprobs is not None:
            log_r = x.reference_logprobs[t] - logprob
            to_base = log_r.exp() - log_r - 1
            loss = loss + config.reference_kl * to_base
        rows.append(
            [
                x.weight[t] * loss, logprob, entropy, teacher_entropy, gate, binds, exact,
                kl_clipped, to_base,
            ]
        )  # fmt: skip
    loss, *statistics = (
        torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in c])
        for c in zip(*rows, strict=True)
    )
    return LossOutput(loss.sum(), *(column.detach() for column in statistics))


def policy_gain(
    case: Case,
    config: LossConfig,
    t: int,
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    sampled: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What GRPO's term and its relatives maximise, and whether a bound binds."""
    x = case.inputs
    ratio = torch.exp(logprob - x.old_logprobs[t])
    if config.policy == "gspo":
        assert x.sequence is not None
        own = x.sequence == x.sequence[t]
        mean = (sampled - x.old_logprobs)[own].mean()
        ratio = torch.exp(mean) * torch.exp(logprob - logprob.detach())
    if config.truncated_importance is not None:
        importance = ratio.detach().clamp(max=config.truncated_importance)
        gain = importance * advantage * torch.exp(logprob - logprob.detach())
        return gain, ratio > config.truncated_importance
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.policy == "cispo":
        return bounded.detach() * advantage * logprob, bounded != ratio
    if config.policy == "sapo":
        tau = config.sapo_tau_positive if advantage > 0 else config.sapo_tau_negative
        return advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1)), torch.tensor(False)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    return gain, bounded * advantage < ratio * advantage


def reweighted(
    advantage: torch.Tensor, gap: torch.Tensor, lam: torch.Tensor | float, config: LossConfig
) -> torch.Tensor:
    """The advantage of the action reweight; lam: λ times the token's factor."""
    sign, eps, threshold = torch.sign(advantage), config.reweight_clip, config.reweight_threshold
    if config.reweight in ("ratio", "inverse"):
        turned = sign if config.reweight == "ratio" else -sign
        evidence = torch.exp(turned * gap).clamp(1 - eps, 1 + eps)
        return advantage * (1 - lam + lam * evidence)
    if config.reweight == "one_sided":
        evidence = (sign * gap.clamp(-eps, eps) - threshold).clamp(min=0)
        return advantage * (1 + lam * evidence)
    change = lam * torch.tanh(gap / config.reweight_scale)
    if abs(float(change)) <= threshold:
        return advantage
    moved = advantage + change
    return moved if moved * advantage > 0 else torch.zeros_like(advantage)


def gate_of(
    gate: GateConfig, index: int, read: dict[Signal, float], limits: Limits | None
) -> float:
    """One gate's factor of one token."""
    at = gate.at if gate.at is not None else limits and limits.thresholds[index]
    if at is None or (gate.of is Signal.IMPORTANCE and limits is None):
        return 1.0
    if gate.of is Signal.IMPORTANCE:
        assert limits is not None
        assert limits.entropy_max is not None
        assert limits.divergence_max is not None
        h = min(1.0, read[Signal.STUDENT_ENTROPY] / limits.entropy_max)
        d = min(1.0, max(0.0, read[Signal.DIVERGENCE] / limits.divergence_max))
        value = h + d - h * d
    else:
        value = read[gate.of]
    if gate.shape == "signed":
        return math.tanh((at - value) / gate.scale)
    if gate.shape in ("rising", "falling"):
        z = (value - at) / gate.scale if gate.shape == "rising" else (at - value) / gate.scale
        return gate.floor + (1 - gate.floor) / (1 + math.exp(-z))
    inside = value >= at if gate.shape == "above" else value <= at
    return 1.0 if inside else gate.floor


def support_entries(
    log_p: torch.Tensor, log_q: torch.Tensor, k: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q of the student's k likeliest tokens and of all others together."""
    if k is None:
        return log_p, log_q
    inside = torch.zeros_like(log_p, dtype=torch.bool)
    inside[log_p.topk(min(k, len(log_p))).indices] = True
    one, other = (torch.cat((x[inside], log_sum(x[~inside]))) for x in (log_p, log_q))
    return one, other


def scored_entries(log_p: torch.Tensor, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q of a teacher's tokens and of all others together."""
    real = scores.logprobs > -torch.inf
    ids = scores.token_ids[real]
    inside = torch.zeros_like(log_p, dtype=torch.bool)
    inside[ids] = True
    own_q = torch.cat((scores.logprobs[real], scores.tail[None]))
    return torch.cat((log_p[ids], log_sum(log_p[~inside]))), own_q


def log_sum(log_p: torch.Tensor) -> torch.Tensor:
    """log Σ p, (1,), −∞ for nothing."""
    if not len(log_p) or bool((log_p == -torch.inf).all()):
        return torch.full((1,), -torch.inf, dtype=log_p.dtype)
    return torch.logsumexp(log_p, 0, keepdim=True)


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
    inputs, options = case.inputs, (case.teacher_temperature, case.limits)
    return routed_loss(case.hidden, case.head, inputs, config, lam, fade, *taught, *options)


def gradients(case: Case, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(case.variables.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(case.variables.items(), found, strict=True)
    }
