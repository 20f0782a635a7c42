"""A block of logits turned into the loss's gradient, in PyTorch's own operations.

fused_torch.py calls `logits_to_gradient` for rows of one route. To add a divergence, see
`losses.DIVERGENCES`: nothing here names one.
"""

from typing import NamedTuple

import torch

from ..schemas.labels import Route, Signal
from .fused_call import Call, floored
from .losses import DIVERGENCES, FLOOR, divergence
from .policy_losses import policy_loss, reweighted_advantage
from .top_k import Support, distinct, logit_slopes, masses, with_rest


class Student(NamedTuple):
    """A block's student: p, logits (rows, vocab); most, log_most: log p = z − most + log_most."""

    logits: torch.Tensor
    p: torch.Tensor
    most: torch.Tensor
    log_most: torch.Tensor
    masked: bool  # whether a logit may be −∞


class Teaching(NamedTuple):
    """A block's divergence: value, exact, clipped, (rows,), and slope, of `divergence`.

    teacher_entropy: (rows,), None if nothing reads it. support, p: None for the whole vocabulary.
    """

    value: torch.Tensor
    exact: torch.Tensor
    clipped: torch.Tensor
    slope: torch.Tensor
    teacher_entropy: torch.Tensor | None
    support: Support | None = None
    p: torch.Tensor | None = None


def logits_to_gradient(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    taught: torch.Tensor | None,
    route: Route,
    positions: torch.Tensor,
    call: Call,
    heated: bool,
    statistics: dict[str, torch.Tensor],
    scratch: torch.Tensor,
) -> None:
    """Turn a block's logits (rows, vocab) into d loss / d logits in place, and fill its statistics.

    Of a routed block, either teacher_logits or taught, its rows of `inputs.scores`, (rows,) int64.
    scratch: (2, rows or more, vocab), overwritten.
    """
    inputs, config = call.inputs, call.config
    ids = inputs.token_ids[positions, None]
    temperature = inputs.temperature[positions, None] if heated else None  # (rows, 1)
    slope = call.head.slope(logits)
    logits = call.head.shape_(logits, temperature)
    p, log_q = scratch[:, : len(logits)]  # (rows, vocab) each
    torch.softmax(logits, -1, out=p)
    # log p = z − z_max + log p_max, only where needed: one exponential per entry is enough.
    most, log_most = logits.amax(-1), p.amax(-1).log()  # (rows,) each
    logprobs = logits.gather(1, ids).squeeze(1) - most + log_most
    # The products go into an existing buffer; vecdot would allocate one.
    products = torch.mul(p, logits, out=log_q)
    entropy = most - log_most - products.sum(-1)
    # 0 · −∞ is NaN, and counts as 0. On CUDA to ask would wait for the device.
    masked = logits.is_cuda or bool(entropy.isnan().any())
    if masked:
        entropy, logprobs = most - log_most - products.nansum(-1), floored(logprobs)
    weight, advantage = inputs.weight[positions], inputs.advantage[positions]
    # Routed tokens return to GRPO as the KL fades; REWEIGHT's never leave it.
    policy_weight = weight * (call.grpo_weight if route in DIVERGENCES else 1.0)
    teaching, kl_loss, kl_weight = None, 0.0, call.kl_weight * weight
    if route != Route.GRPO:
        if teacher_logits is not None:
            assert call.teacher_head is not None
            heat = temperature if call.teacher_temperature is None else call.teacher_temperature
            torch.log_softmax(call.teacher_head.shape_(teacher_logits, heat), -1, out=log_q)
        student = Student(logits, p, most, log_most, masked)
        signals = {Signal.STUDENT_ENTROPY: entropy}
        if route in DIVERGENCES:
            teaching = _teaching(student, teacher_logits, log_q, taught, route, call)
            signals[Signal.DIVERGENCE] = teaching.exact
            teacher_entropy, taught_logprobs = teaching.teacher_entropy, None
        else:  # REWEIGHT
            taught_logprobs, teacher_entropy = _sampled(teacher_logits, log_q, taught, ids, call)
        if teacher_entropy is not None:
            signals[Signal.TEACHER_ENTROPY] = teacher_entropy
            statistics["teacher_entropy"][positions] = teacher_entropy
        gate = call.gate(positions, signals)
        if gate is not None:
            statistics["gate"][positions] = gate
        if teaching is None:
            assert taught_logprobs is not None
            advantage = reweighted_advantage(
                advantage, logprobs, taught_logprobs, call.kl_weight, config,
                call.reweight_factor(positions, gate), call.contrast(positions),
            )  # fmt: skip
        else:
            if config.entropy_beta:
                assert teacher_entropy is not None
                kl_weight = kl_weight * torch.exp(-config.entropy_beta * teacher_entropy)
            factor = call.kl_factor(positions, gate, logprobs)
            if factor is not None:
                kl_weight = kl_weight * factor
            kl_loss = kl_weight * teaching.value
            statistics["kl"][positions] = teaching.exact
            statistics["kl_clipped"][positions] = teaching.clipped.to(teaching.exact.dtype)
    loss, lift, bound, base_kl = policy_loss(
        logprobs, advantage, policy_weight, inputs, positions, config, call.ratio(positions)
    )
    if masked:
        lift = lift.masked_fill(logprobs == FLOOR, 0.0)
    statistics["loss"][positions] = loss + kl_loss
    statistics["logprobs"][positions] = logprobs
    statistics["entropy"][positions] = entropy
    statistics["ratio_clipped"][positions] = bound.to(logprobs.dtype)
    statistics["reference_kl"][positions] = base_kl
    # d log p(y) / d logits = onehot(y) − p; the KL's is λ (s − p Σ s), see losses.DIVERGENCES.
    lift, kl_lift = lift[:, None], kl_weight[:, None]  # (rows, 1), slopes in logits / temperature
    if temperature is not None:
        lift, kl_lift = lift / temperature, kl_lift / temperature
    if teaching is not None and teaching.support is not None:
        assert teaching.p is not None
        token_ids, real, *_ = teaching.support
        own, pull = logit_slopes(real, teaching.p, teaching.slope, lift[:, 0], kl_lift[:, 0])
        gradient = torch.mul(p, -pull[:, None], out=logits)
        gradient.scatter_(1, token_ids, own).scatter_add_(1, ids, lift)
    else:
        kl_slope = None if teaching is None else teaching.slope
        pull = lift if kl_slope is None else lift + kl_lift * kl_slope.sum(-1, keepdim=True)
        gradient = torch.mul(p, -pull, out=logits).scatter_add_(1, ids, lift)
        if kl_slope is not None:
            gradient.addcmul_(kl_slope, kl_lift)
    if slope is not None:
        gradient *= slope


def _teaching(
    student: Student,
    teacher_logits: torch.Tensor | None,
    log_q: torch.Tensor,
    taught: torch.Tensor | None,
    route: Route,
    call: Call,
) -> Teaching:
    """The divergence of a block. Overwrites teacher_logits and log_q; of the student, the logits,
    or with a support p there."""
    reads = Signal.TEACHER_ENTROPY in call.reads
    if taught is not None or call.config.top_k is not None:
        support, entropy = _support(student, teacher_logits, log_q, taught, reads, call)
        p, q = masses(support)
        if reads and entropy is None:  # of the k + 1 entries
            entropy = -(q * support.log_q).sum(-1)
        value, exact, clipped, slope = divergence(
            route, p, support.log_p, q, support.log_q.clone(), call.config
        )
        slope.masked_fill_(support.log_p == FLOOR, 0.0)  # the floor is a constant
        return Teaching(value, exact, clipped, slope, entropy, support, p)
    assert teacher_logits is not None
    logits, p, most, log_most, masked = student
    log_p = logits.sub_(most[:, None]).add_(log_most[:, None])
    q = torch.exp(log_q, out=teacher_logits)
    if masked:
        floored(log_p, out=log_p)
    if log_q.is_cuda or log_q.amin() == -torch.inf:
        floored(log_q, out=log_q)
    entropy = -torch.linalg.vecdot(q, log_q) if reads else None
    value, exact, clipped, slope = divergence(route, p, log_p, q, log_q, call.config)
    if masked:  # the floor is a constant
        slope.masked_fill_(log_p == FLOOR, 0.0)
    return Teaching(value, exact, clipped, slope, entropy)


def _support(
    student: Student,
    teacher_logits: torch.Tensor | None,
    log_q: torch.Tensor,
    taught: torch.Tensor | None,
    reads: bool,
    call: Call,
) -> tuple[Support, torch.Tensor | None]:
    """The entries of a block's divergence, and where q is known its entropy if `reads` it.

    Overwrites the student's p, teacher_logits and log_q.
    """
    logits, p, most, log_most, _ = student
    scores, entropy = call.inputs.scores, None
    if taught is not None:
        assert scores is not None
        own_q, rest_q = scores.logprobs[taught], scores.tail[taught]
        token_ids, real = distinct(scores.token_ids[taught], own_q)
    else:
        assert call.config.top_k is not None
        assert teacher_logits is not None
        token_ids = logits.topk(min(call.config.top_k, logits.shape[-1]), -1).indices
        own_q = log_q.gather(1, token_ids)
        real = torch.ones_like(token_ids, dtype=torch.bool)
        q = torch.exp(log_q, out=teacher_logits)
        if reads:
            entropy = -torch.linalg.vecdot(q, floored(log_q, out=log_q))
        rest_q = q.scatter_(1, token_ids, 0.0).sum(-1).log()
    own_p = logits.gather(1, token_ids) - most[:, None] + log_most[:, None]
    # The rest is summed, not 1 minus the support: where that is small, rounding would be all of it.
    # p is lost at the support, whose slopes do not come from it.
    rest_p = p.scatter_(1, token_ids, 0.0).sum(-1).log()
    log_p = with_rest(own_p.masked_fill(~real, -torch.inf), rest_p)
    return Support(token_ids, real, log_p, with_rest(own_q.to(log_p.dtype), rest_q)), entropy


def _sampled(
    teacher_logits: torch.Tensor | None,
    log_q: torch.Tensor,
    taught: torch.Tensor | None,
    ids: torch.Tensor,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The teacher's log-probabilities of the sampled tokens, and its entropy if it is read."""
    reads, scores = Signal.TEACHER_ENTROPY in call.reads, call.inputs.scores
    if teacher_logits is None:
        assert scores is not None
        assert scores.sampled is not None
        logprobs = floored(scores.sampled[taught])
        own = with_rest(scores.logprobs[taught], scores.tail[taught])
        return logprobs, -(own.exp() * own).sum(-1) if reads else None
    logprobs = floored(log_q.gather(1, ids).squeeze(1))
    if not reads:
        return logprobs, None
    q = torch.exp(log_q, out=teacher_logits)
    return logprobs, -torch.linalg.vecdot(q, floored(log_q, out=log_q))
