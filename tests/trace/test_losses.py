"""The objective against a float64 reference in plain Python, and on examples by hand."""

import math
import random
from dataclasses import dataclass, replace
from math import exp, log

import pytest
import torch

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs, LossOutput, clip_kl, divergence
from trace_opd.trace.policy_losses import clipped_surrogate

W0 = 0.5
VOCAB = 5
NO_CLIP = LossConfig(kl_clip=KlClip.NONE)


# --- the reference: METHOD.md's formulas in plain loops ---


@dataclass
class Response:
    """One response y; logits and teacher's logits are lists of shape (tokens, vocab)."""

    logits: list[list[float]]
    teacher: list[list[float]]
    tokens: list[int]
    old_logprobs: list[float]
    advantage: float
    route: list[int]


def softmax(logits: list[float]) -> list[float]:
    total = math.fsum(exp(x) for x in logits)
    return [exp(x) / total for x in logits]


def reference_loss(responses: list[Response], lam: float, config: LossConfig) -> float:
    loss = 0.0
    for y in responses:
        grpo, kls = 0.0, []
        for t, token in enumerate(y.tokens):
            p, q = softmax(y.logits[t]), softmax(y.teacher[t])
            ratio = p[token] / exp(y.old_logprobs[t])
            bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            gain = min(ratio * y.advantage, bounded * y.advantage)
            if y.route[t] == 0:
                grpo += gain
            else:
                grpo += (1 - lam / W0) * gain
                kls.append(reference_kl(p, q, y.route[t], config))
        loss -= grpo / len(y.tokens)
        if kls:
            mean_over_spans = math.fsum(kls) / len(kls)
            loss += lam * mean_over_spans * len(kls) / len(y.tokens)
    return loss / len(responses)


def reference_kl(p: list[float], q: list[float], route: int, config: LossConfig) -> float:
    first, second = (q, p) if route == 1 else (p, q)  # FKL is KL(q‖p), RKL is KL(p‖q)
    terms = [a * (log(a) - log(b)) for a, b in zip(first, second, strict=True)]
    bound = config.kl_clip_value
    if config.kl_clip == "entry_above":
        return math.fsum(min(term, bound) for term in terms)
    if config.kl_clip == "entry_symmetric":
        return math.fsum(max(-bound, min(term, bound)) for term in terms)
    return min(math.fsum(terms), bound) if config.kl_clip == "token" else math.fsum(terms)


def reference_gradient(responses: list[Response], lam: float, config: LossConfig) -> list[float]:
    """Central differences of the reference, ordered by response, token, vocabulary entry."""
    gradient, step = [], 1e-6
    for y in responses:
        for row in y.logits:
            for v in range(VOCAB):
                kept = row[v]
                row[v] = kept + step
                above = reference_loss(responses, lam, config)
                row[v] = kept - step
                below = reference_loss(responses, lam, config)
                row[v] = kept
                gradient.append((above - below) / (2 * step))
    return gradient


# --- cases ---


def response(
    seed: object, route: list[int], advantage: float, log_ratio: float | None = None
) -> Response:
    """Random logits; log_ratio fixes the ratio to the sampling policy, by default near 1."""
    rng = random.Random(str(seed))
    logits = [[rng.gauss(0, 1.5) for _ in range(VOCAB)] for _ in route]
    teacher = [[x + rng.gauss(0, 1) for x in row] for row in logits]
    tokens = [rng.randrange(VOCAB) for _ in route]
    offsets = [rng.gauss(0, 0.1) if log_ratio is None else log_ratio for _ in route]
    old = [
        log(softmax(row)[token]) - offset
        for row, token, offset in zip(logits, tokens, offsets, strict=True)
    ]
    return Response(logits, teacher, tokens, old, advantage, route)


def responses(*cases: tuple) -> list[Response]:
    return [response((index, *case), *case) for index, case in enumerate(cases)]


CASES = {
    "grpo only": responses(([0, 0, 0], 1.2), ([0, 0], -0.7)),
    "fkl spans": responses(([0, 1, 1, 0], 1.0), ([1, 0], 0.5), ([0, 0, 0], -1.5)),
    "rkl spans": responses(([0, 0, 0], 1.5), ([0, 2, 2, 0], -0.5), ([0, 2], -1.0)),
    "fkl on right, rkl on wrong": responses(([0, 1, 0, 1], 0.8), ([2, 0, 0, 2, 2], -0.8)),
    "both in one response": responses(([1, 2, 0, 2, 1], 0.6), ([0, 0], -0.6)),
    "all routed": responses(([1, 1, 1], 1.0), ([2, 2], -1.0)),
    "with and without spans": responses(([0, 0, 0, 0], -0.4), ([0, 1], 0.4)),
    "equal rewards": responses(([0, 1, 1], 0.0), ([0, 2, 0], 0.0)),
    "one token": responses(([1], 1.0)),
    "far above, advantage positive": responses(([0, 1, 2, 0], 1.0, 1.5)),
    "far above, advantage negative": responses(([0, 1, 2, 0], -1.0, 1.5)),
    "far below, advantage positive": responses(([0, 1, 2, 0], 1.0, -1.5)),
    "far below, advantage negative": responses(([0, 1, 2, 0], -1.0, -1.5)),
}


@dataclass(frozen=True)
class Example:
    """A micro-batch whose hidden states are its logits: the head is the identity."""

    logits: torch.Tensor
    teacher_logits: torch.Tensor | None
    inputs: LossInputs

    @property
    def route(self) -> torch.Tensor:
        return self.inputs.route

    @property
    def weight(self) -> torch.Tensor:
        return self.inputs.weight

    def loss(self, lam: float, config: LossConfig) -> LossOutput:
        head = Head(torch.eye(self.logits.shape[1], dtype=self.logits.dtype))
        return routed_loss(
            self.logits, head, self.inputs, config, lam, 1 - lam / W0, self.teacher_logits, head
        )


def as_inputs(cases: list[Response], dtype: torch.dtype = torch.float64) -> Example:
    def flat(values: list, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.tensor([x for y in values for x in y], dtype=kind)

    routed = [[row for row, r in zip(y.teacher, y.route, strict=True) if r] for y in cases]
    return Example(
        flat([y.logits for y in cases]).requires_grad_(),
        flat(routed) if any(routed) else None,
        LossInputs(
            token_ids=flat([y.tokens for y in cases], torch.int64),
            old_logprobs=flat([y.old_logprobs for y in cases]),
            advantage=flat([[y.advantage] * len(y.tokens) for y in cases]),
            weight=flat([[1 / (len(cases) * len(y.tokens))] * len(y.tokens) for y in cases]),
            temperature=flat([[1.0] * len(y.tokens) for y in cases]),
            route=flat([y.route for y in cases], torch.uint8),
        ),
    )


def loss_and_gradient(
    example: Example, lam: float, config: LossConfig
) -> tuple[float, torch.Tensor]:
    loss = example.loss(lam, config).loss
    (gradient,) = torch.autograd.grad(loss, example.logits)
    return loss.item(), gradient


@pytest.mark.parametrize("lam", [0.0, 0.2, W0])
@pytest.mark.parametrize("clip", list(KlClip))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_equal_the_reference(case, clip, lam):
    config = LossConfig(kl_clip=clip)
    loss, gradient = loss_and_gradient(as_inputs(case), lam, config)
    assert loss == pytest.approx(reference_loss(case, lam, config), rel=1e-12, abs=1e-14)
    expected = torch.tensor(reference_gradient(case, lam, config), dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", list(KlClip))
def test_in_float32_loss_and_gradient_equal_the_reference_to_its_precision(clip):
    case, config = CASES["both in one response"], LossConfig(kl_clip=clip)
    loss, gradient = loss_and_gradient(as_inputs(case, torch.float32), 0.2, config)
    assert loss == pytest.approx(reference_loss(case, 0.2, config), rel=1e-5)
    expected = torch.tensor(reference_gradient(case, 0.2, config), dtype=torch.float32)
    torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    inputs = as_inputs(CASES["fkl spans"], torch.float32)
    assert inputs.teacher_logits is not None
    low = replace(
        inputs,
        logits=inputs.logits.detach().bfloat16().requires_grad_(),
        teacher_logits=inputs.teacher_logits.bfloat16(),
    )
    rounded = replace(
        inputs,
        logits=low.logits.detach().float().requires_grad_(),
        teacher_logits=inputs.teacher_logits.bfloat16().float(),
    )
    loss = low.loss(0.2, NO_CLIP).loss
    assert loss.dtype == torch.float32
    assert loss.item() == rounded.loss(0.2, NO_CLIP).loss.item()


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("clip", list(KlClip))
def test_the_clips_bound_and_the_ratios_bounds_are_the_configs(clip, bound):
    config = LossConfig(kl_clip=clip, kl_clip_value=bound, clip_low=0.05, clip_high=0.08)
    case = CASES["fkl on right, rkl on wrong"]
    loss, gradient = loss_and_gradient(as_inputs(case), 0.3, config)
    assert loss == pytest.approx(reference_loss(case, 0.3, config), rel=1e-12)
    expected = torch.tensor(reference_gradient(case, 0.3, config), dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-6, atol=1e-9)


def test_cutting_a_step_in_micro_batches_changes_neither_loss_nor_gradient():
    case = CASES["fkl spans"]
    at_once = as_inputs(case)
    loss, gradient = loss_and_gradient(at_once, 0.2, LossConfig())
    parts = []
    for y in case:
        part = as_inputs([y])
        parts.append(
            loss_and_gradient(
                replace(part, inputs=replace(part.inputs, weight=part.weight / len(case))),
                0.2,
                LossConfig(),
            )
        )
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-12, atol=1e-15)


# --- limits of the schedule ---


def test_at_lambda_0_the_loss_is_plain_grpo_whatever_the_routes_and_the_teacher():
    case = CASES["both in one response"]
    plain = [replace(y, route=[0] * len(y.route)) for y in case]
    loss, gradient = loss_and_gradient(as_inputs(case), 0.0, LossConfig())
    expected, expected_gradient = loss_and_gradient(as_inputs(plain), 0.0, LossConfig())
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)


def test_at_lambda_w0_routed_tokens_get_no_grpo():
    case = CASES["fkl spans"]
    other_reward = [replace(y, advantage=-3 * y.advantage) for y in case]
    _, gradient = loss_and_gradient(as_inputs(case), W0, LossConfig())
    _, other = loss_and_gradient(as_inputs(other_reward), W0, LossConfig())
    routed = as_inputs(case).route != 0
    torch.testing.assert_close(gradient[routed], other[routed], rtol=0, atol=0)
    assert (gradient[~routed] != other[~routed]).any()


def test_equal_rewards_leave_the_kl_alone_to_teach():
    inputs = as_inputs(CASES["equal rewards"])
    _, gradient = loss_and_gradient(inputs, 0.3, NO_CLIP)
    assert (gradient[inputs.route == 0] == 0).all()
    assert (gradient[inputs.route != 0] != 0).any()


# --- gradients in closed form ---


def test_the_forward_kls_logit_gradient_is_weight_times_p_minus_q():
    inputs = as_inputs(responses(([1, 1, 1, 1], 0.0), ([1, 1], 0.0)))
    _, gradient = loss_and_gradient(inputs, 0.3, NO_CLIP)
    p, q = (torch.softmax(x, -1) for x in (inputs.logits, inputs.teacher_logits))
    torch.testing.assert_close(gradient, 0.3 * inputs.weight[:, None] * (p - q))


def test_the_forward_kls_lift_does_not_vanish_with_the_students_probability():
    logits = torch.tensor([[-20.0, 0.0]], dtype=torch.float64, requires_grad=True)
    one = as_inputs(responses(([1], 0.0))).inputs
    found = []
    for route in (Route.FKL, Route.RKL):
        inputs = replace(one, token_ids=torch.tensor([1]), route=torch.tensor([int(route)]))
        example = Example(logits, torch.zeros(1, 2, dtype=torch.float64), inputs)
        found.append(loss_and_gradient(example, 1.0, NO_CLIP)[1])
    forward, reverse = found
    assert forward[0, 0].item() == pytest.approx(-0.5, abs=1e-8)
    assert abs(reverse[0, 0].item()) < 1e-7


def test_the_reverse_kls_logit_gradient_scales_with_the_students_probability():
    inputs = as_inputs(responses(([2, 2, 2, 2], 0.0), ([2, 2], 0.0)))
    _, gradient = loss_and_gradient(inputs, 0.3, NO_CLIP)
    log_p, log_q = (torch.log_softmax(x, -1) for x in (inputs.logits, inputs.teacher_logits))
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, 0.3 * inputs.weight[:, None] * p * (log_p - log_q - kl))


@pytest.mark.parametrize("route", [Route.FKL, Route.RKL])
def test_without_a_clip_the_kl_is_0_and_flat_where_the_teacher_agrees(route):
    inputs = as_inputs(responses(([int(route)] * 3, 0.0)))
    inputs = replace(inputs, teacher_logits=inputs.logits.detach() + 3.0)
    loss, gradient = loss_and_gradient(inputs, 0.3, NO_CLIP)
    assert loss == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_no_gradient_reaches_the_teacher():
    inputs = as_inputs(CASES["fkl spans"])
    teacher = inputs.teacher_logits.requires_grad_()
    inputs.loss(0.3, LossConfig()).loss.backward()
    assert teacher.grad is None


# --- by hand ---

P, Q = [0.5, 0.5], [0.75, 0.25]


def kl_of(route: Route, **config) -> tuple[float, float, bool]:
    """The clipped KL, the exact one, and whether the clip binds."""
    p, q = (torch.tensor([x], dtype=torch.float64) for x in (P, Q))
    value, exact, clipped, _ = divergence(route, p, p.log(), q, q.log(), LossConfig(**config))
    return value.item(), exact.item(), bool(clipped.item())


# Terms of KL(q‖p): ¾ log(3/2) = 0.304099, ¼ log(1/2) = −0.173287.
# Terms of KL(p‖q): ½ log(2/3) = −0.202733, ½ log 2 = 0.346574.
@pytest.mark.parametrize(
    ("route", "clip", "expected"),
    [
        (Route.FKL, "none", 0.130812),
        (Route.FKL, "token", 0.05),
        (Route.FKL, "entry_above", 0.05 - 0.173287),
        (Route.FKL, "entry_symmetric", 0.05 - 0.05),
        (Route.RKL, "none", 0.143841),
        (Route.RKL, "token", 0.05),
        (Route.RKL, "entry_above", 0.05 - 0.202733),
        (Route.RKL, "entry_symmetric", 0.05 - 0.05),
    ],
)
def test_each_clip_of_each_kl_by_hand(route, clip, expected):
    assert kl_of(route, kl_clip=clip, kl_clip_value=0.05)[0] == pytest.approx(expected, abs=2e-6)


def test_the_exact_kl_is_reported_with_the_clipped_one():
    assert kl_of(Route.FKL, kl_clip="token", kl_clip_value=0.05)[1:] == (
        pytest.approx(0.130812, abs=1e-6),
        True,
    )
    assert kl_of(Route.FKL, kl_clip="token", kl_clip_value=0.2)[2] is False


@pytest.mark.parametrize("clip", list(KlClip))
def test_no_gradient_flows_where_a_clip_binds(clip):
    terms = torch.tensor([[0.3, -0.1, 0.01]], requires_grad=True)
    total, kept = clip_kl(terms, terms.sum(-1), clip, 0.05)
    (gradient,) = torch.autograd.grad(total.sum(), terms)
    expected = {
        KlClip.ENTRY_ABOVE: [0.0, 1.0, 1.0],
        KlClip.ENTRY_SYMMETRIC: [0.0, 0.0, 1.0],
        KlClip.TOKEN: [0.0, 0.0, 0.0],
        KlClip.NONE: [1.0, 1.0, 1.0],
    }[clip]
    assert gradient.tolist() == [expected]
    passes = torch.ones_like(terms) if kept is None else kept.expand_as(terms).float()
    assert passes.tolist() == [expected]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (1.0, 1.0, -1.0, False),
        (2.0, 1.0, -1.28, True),
        (1.25, 1.0, -1.25, False),  # inside clip-higher, outside a symmetric 0.2
        (2.0, -1.0, 2.0, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),
        (2.0, 0.0, 0.0, False),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, binds):
    new = torch.tensor([log(0.2)], dtype=torch.float64)
    old = new - log(ratio)
    surrogate, clipped = clipped_surrogate(
        new, old, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28
    )
    assert surrogate.item() == pytest.approx(loss)
    assert clipped.item() is binds


def test_a_response_of_four_tokens_by_hand():
    # Four tokens at ratio 1 with advantage 1, one of them FKL-routed with p and q from above,
    # λ = ¼ and w0 = ½: L = ¼ (−3 − ½ + ¼ · 0.130812).
    logits = torch.tensor([P] * 4, dtype=torch.float64).log().requires_grad_()
    inputs = LossInputs(
        token_ids=torch.tensor([0, 1, 0, 1]),
        old_logprobs=torch.full((4,), log(0.5), dtype=torch.float64),
        advantage=torch.ones(4, dtype=torch.float64),
        weight=torch.full((4,), 0.25, dtype=torch.float64),
        temperature=torch.ones(4, dtype=torch.float64),
        route=torch.tensor([0, 0, 1, 0], dtype=torch.uint8),
    )
    example = Example(logits, torch.tensor([Q], dtype=torch.float64).log(), inputs)
    out = example.loss(0.25, NO_CLIP)
    assert out.loss.item() == pytest.approx((-3.5 + 0.25 * 0.130812) / 4, abs=1e-7)
    assert out.entropy.tolist() == pytest.approx([log(2)] * 4)
    assert out.logprobs.tolist() == pytest.approx([log(0.5)] * 4)
    assert out.kl.tolist() == pytest.approx([0, 0, 0.130812, 0], abs=1e-6)
    assert not out.ratio_clipped.any()
    # d/dlogit of −ratio is −(1{v = token} − p_v); the routed token adds λ (p − q).
    out.loss.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-0.5 / 4, 0.5 / 4])
    assert logits.grad[2].tolist() == pytest.approx(
        [(-0.25 - 0.25 * 0.25) / 4, (0.25 + 0.25 * 0.25) / 4]
    )
