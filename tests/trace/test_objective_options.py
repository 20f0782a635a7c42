"""The objective's options on examples by hand; test_fused.py combines them all."""

from math import exp, log

import numpy as np
import pytest
import torch

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import Route
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs, LossOutput, divergence, token_weights
from trace_opd.trace.policy_losses import reference_kl, reweighted_advantage

# Student and teacher over two tokens. KL(q‖p) = ¾ log(3/2) + ¼ log(1/2) = 0.130812.
P, Q, FORWARD = [0.5, 0.5], [0.75, 0.25], 0.130812


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(
    config: LossConfig,
    route: Route = Route.GRPO,
    kl_weight: float = 0.0,
    advantage: float = 1.0,
    ratio: float = 1.0,
    q: list[float] = Q,
    base: float | None = None,
) -> tuple[LossOutput, list[float]]:
    """Token 0 of weight 1 under P: the loss, and its gradient in the logits.

    ratio: p over the sampling policy's probability. base: the base policy's probability.
    """
    logits = double(*P).log()[None].requires_grad_()
    inputs = LossInputs(
        token_ids=torch.tensor([0]),
        old_logprobs=double(log(0.5 / ratio)),
        advantage=double(advantage),
        weight=double(1.0),
        temperature=double(1.0),
        route=torch.tensor([int(route)], dtype=torch.uint8),
        reference_logprobs=None if base is None else double(log(base)),
    )
    head = Head(torch.eye(2, dtype=torch.float64))
    taught = double(*q).log()[None] if route else None
    out = routed_loss(logits, head, inputs, config, kl_weight, 0.0, taught, head)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out, gradient[0].tolist()


# --- jsd ---


def in_logits(slope: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The gradient in the logits that follows from a divergence's slope."""
    return slope - p * slope.sum(-1, keepdim=True)


def jsd(p: list[float], q: list[float], **config) -> tuple[float, torch.Tensor]:
    """The value, and its gradient in the student's logits."""
    at_p, at_q = double(*p)[None], double(*q)[None]
    value, _, _, slope = divergence(
        Route.JSD, at_p, at_p.log(), at_q, at_q.log(), LossConfig(**config)
    )
    return value.item(), in_logits(slope, at_p)[0]


# m = (5/8, 3/8). Terms: ⅜ log(6/5) + ¼ log(4/5) = 0.012585; ⅛ log(2/3) + ¼ log(4/3) = 0.021237.
@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("none", 0.033822),
        ("entry_above", 0.012585 + 0.02),
        ("entry_symmetric", 0.012585 + 0.02),
        ("token", 0.02),
    ],
)
def test_jsd_by_hand(clip, expected):
    value, _ = jsd(P, Q, jsd_beta=0.5, kl_clip=clip, kl_clip_value=0.02)
    assert value == pytest.approx(expected, abs=1e-6)


def test_half_way_jsd_is_symmetric():
    assert jsd(P, Q)[0] == pytest.approx(jsd(Q, P)[0])


@pytest.mark.parametrize("other", [Route.FKL, Route.RKL])
def test_jsd_converges_to_the_kls_at_its_ends(other):
    share = 1e-6
    value, gradient = jsd(P, Q, jsd_beta=share if other is Route.FKL else 1 - share)
    p, q = double(*P)[None], double(*Q)[None]
    kl, _, _, slope = divergence(other, p, p.log(), q, q.log(), LossConfig())
    assert value / share == pytest.approx(kl.item(), rel=1e-4)
    torch.testing.assert_close(gradient / share, in_logits(slope, p)[0], rtol=1e-4, atol=1e-6)


def test_jsd_stays_bounded_and_finite_where_student_and_teacher_share_nothing():
    log_p = torch.log_softmax(torch.tensor([[0.0, 400.0, -400.0]]), -1)
    log_q = torch.log_softmax(torch.tensor([[400.0, 0.0, -400.0]]), -1)
    value, _, _, gradient = divergence(
        Route.JSD, log_p.exp(), log_p, log_q.exp(), log_q, LossConfig(jsd_beta=0.5)
    )
    assert value.item() == pytest.approx(log(2))
    assert gradient.isfinite().all()


# --- reweight ---


@pytest.mark.parametrize(
    ("advantage", "q", "expected"),
    [
        (1.0, 0.75, 1.05),  # 1 − ¼ + ¼ · min(1.5, 1.2)
        (1.0, 0.55, 1.025),  # 1 − ¼ + ¼ · 1.1
        (1.0, 0.25, 0.95),  # 1 − ¼ + ¼ · max(0.5, 0.8)
        (-1.0, 0.75, -0.95),  # the likelier the token for the teacher, the smaller its penalty
        (-1.0, 0.25, -1.05),
        (0.0, 0.75, 0.0),
    ],
)
def test_reweighted_advantage_by_hand(advantage, q, expected):
    found = reweighted_advantage(
        double(advantage), double(log(0.5)), double(log(q)), 0.25, LossConfig()
    )
    assert found.item() == pytest.approx(expected)
    out, gradient = one_token(LossConfig(), Route.REWEIGHT, 0.25, advantage, q=[q, 1 - q])
    assert out.loss.item() == pytest.approx(-expected)
    # The factor is a constant: −A' (onehot − p), nothing through q/p.
    assert gradient == pytest.approx([-0.5 * expected, 0.5 * expected])


def test_reweighted_tokens_have_no_divergence():
    out, _ = one_token(LossConfig(), Route.REWEIGHT, 0.25)
    assert (out.kl.item(), out.kl_clipped.item()) == (0, 0)


# --- the weight of a divergence ---


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_divergence_weighs_by_the_teachers_entropy(beta):
    even = [0.5, 0.5 - 1e-12]
    skew, _ = one_token(LossConfig(entropy_beta=beta), Route.FKL, 0.3)
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert skew.loss.item() == pytest.approx(0.3 * exp(-beta * entropy) * FORWARD, rel=1e-5)
    assert skew.kl.item() == pytest.approx(FORWARD, abs=1e-6)  # reported without the weight
    out, gradient = one_token(LossConfig(entropy_beta=beta), Route.RKL, 0.3, q=even)
    assert out.loss.item() == pytest.approx(0, abs=1e-9)
    assert gradient == pytest.approx([0, 0], abs=1e-9)


def test_the_gradient_of_the_divergence_has_the_same_weight():
    _, plain = one_token(LossConfig(), Route.FKL, 0.3)
    _, weighed = one_token(LossConfig(entropy_beta=1.0), Route.FKL, 0.3)
    factor = exp(0.75 * log(0.75) + 0.25 * log(0.25))
    assert weighed == pytest.approx([factor * x for x in plain])


# --- grpo off ---


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_without_grpo_rewards_and_ratios_change_nothing(ratio):
    config = LossConfig(grpo=False)
    for advantage in (-2.0, 0.0, 2.0):
        plain, gradient = one_token(config, advantage=advantage, ratio=ratio)
        assert (plain.loss.item(), gradient) == (0, [0, 0])
        routed, gradient = one_token(config, Route.FKL, 0.3, advantage, ratio)
        assert routed.loss.item() == pytest.approx(0.3 * FORWARD, abs=1e-6)
        assert gradient == pytest.approx([0.3 * (0.5 - 0.75), 0.3 * (0.5 - 0.25)])


def test_without_grpo_reweighting_has_no_effect():
    assert one_token(LossConfig(grpo=False), Route.REWEIGHT, 0.3)[1] == [0, 0]


# --- truncated importance sampling ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "binds"),
    [
        (1.0, 1.0, 1.0, 0), (1.5, 1.0, 1.5, 0), (3.0, 1.0, 2.0, 1), (3.0, -1.0, 2.0, 1),
        (0.1, -1.0, 0.1, 0),
    ],
)  # fmt: skip
def test_the_importance_weight_is_capped_and_a_constant(ratio, advantage, weight, binds):
    out, gradient = one_token(
        LossConfig(truncated_importance=2.0), advantage=advantage, ratio=ratio
    )
    assert out.loss.item() == pytest.approx(-weight * advantage)
    assert gradient == pytest.approx([-0.5 * weight * advantage, 0.5 * weight * advantage])
    assert out.ratio_clipped.item() == binds


def test_the_clipped_ratio_gives_no_gradient_where_the_cap_still_does():
    assert one_token(LossConfig(), ratio=3.0)[1] == [0, 0]


# --- the KL to the base policy ---


def test_the_kl_to_the_base_policy_by_hand():
    # r = base / p = ½: ½ − log ½ − 1; its slope in log p is 1 − r.
    expected = 0.5 + log(2) - 1
    assert reference_kl(double(log(0.5)), double(log(0.25))).item() == pytest.approx(expected)
    for grpo in (True, False):
        config = LossConfig(reference_kl=0.1, grpo=grpo)
        out, gradient = one_token(config, advantage=0.0, base=0.25)
        assert out.loss.item() == pytest.approx(0.1 * expected)
        assert out.reference_kl.item() == pytest.approx(expected)
        assert gradient == pytest.approx([0.1 * 0.5 * 0.5, -0.1 * 0.5 * 0.5])


def test_the_reference_kl_applies_to_routed_tokens_too():
    config = LossConfig(reference_kl=0.1)
    near, _ = one_token(config, Route.FKL, 0.3, base=0.5)
    far, _ = one_token(config, Route.FKL, 0.3, base=0.25)
    assert far.loss.item() - near.loss.item() == pytest.approx(0.1 * (0.5 + log(2) - 1))


# --- aggregation ---


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence", [1 / 12, 1 / 6, 1 / 3]),  # 1 / (3 |y|)
        ("token", [1 / 7, 1 / 7, 1 / 7]),  # 1 / (4 + 2 + 1)
        ("constant", [1 / 300, 1 / 300, 1 / 300]),  # 1 / (3 · 100)
    ],
)
def test_a_tokens_weight_by_hand(aggregation, expected):
    config = LossConfig(aggregation=aggregation, constant_length=100)
    weights = token_weights([4, 2, 1], config)
    assert weights.dtype == np.float32
    assert weights.tolist() == pytest.approx(expected)
    assert token_weights([], config).shape == (0,)


def test_the_sequence_weights_give_the_mean_over_responses_of_the_mean_over_tokens():
    lengths = [4, 2, 1, 9]
    values = [np.random.default_rng(n).normal(size=n) for n in lengths]
    weighted = sum(
        weight * row.sum()
        for weight, row in zip(token_weights(lengths, LossConfig()), values, strict=True)
    )
    assert weighted == pytest.approx(np.mean([row.mean() for row in values]))


def test_an_empty_response_counts_as_a_response_and_weighs_on_no_token():
    assert token_weights([0, 2], LossConfig()).tolist() == pytest.approx([1 / 2, 1 / 4])
