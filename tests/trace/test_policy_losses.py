"""Forms of GRPO's term and of the action reweight against closed forms, in float64."""

from math import exp, log, tanh

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from trace_opd.schemas.configs import LossConfig
from trace_opd.trace.losses import LossInputs
from trace_opd.trace.policy_losses import (
    POLICY_LOSSES,
    REWEIGHTS,
    SampledTokens,
    policy_loss,
    reweighted_advantage,
)

GRPO, GSPO, CISPO, SAPO = (LossConfig(policy=name) for name in ("grpo", "gspo", "cispo", "sapo"))
# A token under ratio r has log p = log ½ and log p_old = log ½ − log r.
LOG_P = log(0.5)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def terms(
    config: LossConfig, ratios: torch.Tensor, advantage: torch.Tensor, sequence: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, slopes in log p and bounds, (tokens,) each; sequence: each token's, from 0."""
    logprobs = torch.full_like(ratios, LOG_P)
    inputs = LossInputs(
        token_ids=torch.zeros(len(ratios), dtype=torch.int64),
        old_logprobs=logprobs - ratios.log(),
        advantage=advantage,
        weight=torch.ones_like(ratios),
        temperature=torch.ones_like(ratios),
        route=torch.zeros(len(ratios), dtype=torch.uint8),
    )
    index = torch.tensor(sequence)
    means = double(*(ratios.log()[index == i].mean().item() for i in index.unique()))
    one, rows = torch.ones_like(ratios), torch.arange(len(ratios))
    value, slope, bound, _ = policy_loss(
        logprobs, advantage, one, inputs, rows, config, means[index]
    )
    return value, slope, bound


def one(config: LossConfig, ratio: float, advantage: float) -> tuple[float, float, bool]:
    value, slope, bound = terms(config, double(ratio), double(advantage), [0])
    return value.item(), slope.item(), bool(bound.item())


def test_every_form_of_the_config_has_its_function():
    kinds = LossConfig.model_fields
    assert list(POLICY_LOSSES) == list(kinds["policy"].annotation.__args__)
    assert list(REWEIGHTS) == list(kinds["reweight"].annotation.__args__)


# --- forms of GRPO's term ---


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.5])
def test_on_policy_each_gradient_is_the_plain_policy_gradient(name, advantage):
    _, slope, bound = one(LossConfig(policy=name), 1.0, advantage)
    assert slope == pytest.approx(-advantage)
    assert not bound


# ε_low 0.2, ε_high 0.28. The slope is −A r̂ on each side of the bounds, whatever A's sign.
@pytest.mark.parametrize(
    ("ratio", "weight", "bound"), [(0.5, 0.8, True), (1.2, 1.2, False), (3.0, 1.28, True)]
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_weighs_the_policy_gradient_by_the_clipped_ratio(ratio, weight, bound, advantage):
    value, slope, bounded = one(CISPO, ratio, advantage)
    assert value == pytest.approx(-weight * advantage * LOG_P)
    assert slope == pytest.approx(-weight * advantage)
    assert bounded is bound


def test_cispo_has_no_lower_bound_from_clip_low_1_on():
    config = LossConfig(policy="cispo", clip_low=1.0, clip_high=4.0)
    assert one(config, 0.01, 1.0)[1:] == (pytest.approx(-0.01), False)
    assert one(config, 9.0, 1.0)[1:] == (pytest.approx(-5.0), True)


# At r = 1.5 the gate is σ(τ / 2): f = (4 / τ) σ, and f' r = 4 σ (1 − σ) r.
@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_by_hand(advantage, tau):
    gate = 1 / (1 + exp(-tau / 2))
    value, slope, bound = one(SAPO, 1.5, advantage)
    assert value == pytest.approx(-advantage * 4 / tau * gate)
    assert slope == pytest.approx(-advantage * 4 * gate * (1 - gate) * 1.5)
    assert not bound


def test_sapo_fades_on_both_sides_and_stays_finite():
    slopes = [abs(one(SAPO, ratio, 1.0)[1]) for ratio in (1e-30, 1.0, 20.0, 1e30)]
    assert slopes[0] < 1e-20
    assert slopes[2] < 1e-6
    assert slopes[3] == 0


# Sequence 0: log s = ½ log(1.5 · 0.9) = ½ log 1.35, s = 1.16190. Sequence 1: s = 2, clipped.
def test_gspo_by_hand():
    value, slope, bound = terms(GSPO, double(1.5, 0.9, 2.0), double(1.0, 1.0, 1.0), [0, 0, 1])
    s = 1.35**0.5
    assert_close(value, double(-s, -s, -1.28))
    assert_close(slope, double(-s, -s, 0.0))
    assert bound.tolist() == [False, False, True]


def test_gspos_gradient_is_that_of_the_sequences_ratio():
    # GSPO: −s A with s = exp(mean of log p − log p_old); its slope in each log p is −s A / |y|.
    ratios, advantage = double(1.4, 0.8, 1.1), -0.7
    logprobs = torch.full_like(ratios, LOG_P).requires_grad_()
    s = (logprobs - (LOG_P - ratios.log())).mean().exp()
    (expected,) = torch.autograd.grad(-s * advantage, logprobs)
    _, slope, _ = terms(GSPO, ratios, torch.full_like(ratios, advantage), [0, 0, 0])
    assert_close(slope / 3, expected)


@given(
    st.floats(0.2, 5), st.floats(-3, 3), st.integers(1, 5), st.floats(0.01, 0.9), st.floats(0.01, 2)
)
def test_gspo_is_grpo_where_a_sequences_ratios_are_equal(ratio, advantage, tokens, low, high):
    bounds = {"clip_low": low, "clip_high": high}
    ratios, advantages = double(*[ratio] * tokens), double(*[advantage] * tokens)
    grpo = terms(LossConfig(**bounds), ratios, advantages, [0] * tokens)
    gspo = terms(LossConfig(policy="gspo", **bounds), ratios, advantages, [0] * tokens)
    edge = min(abs(ratio - (1 - low)), abs(ratio - (1 + high)))
    if edge > 1e-9:
        assert_close(gspo, grpo)


def test_gspo_without_the_sequences_ratios_is_an_error():
    tokens = SampledTokens(double(LOG_P), double(LOG_P), double(1.0))
    with pytest.raises(ValueError, match="mean log-ratio"):
        POLICY_LOSSES["gspo"](tokens, GSPO)


def test_truncated_importance_is_refused_with_another_form():
    with pytest.raises(ValueError, match="is a bound of policy grpo, and policy sapo has its own"):
        LossConfig(policy="sapo", truncated_importance=2.0)


# --- forms of the action reweight ---


def modulated(
    form: str,
    advantage: float,
    gap: float,
    strength: float = 0.5,
    factor: float | None = None,
    contrast: float | None = None,
    **config: float,
) -> float:
    """The advantage of a token whose teacher's log-probability is `gap` above the student's."""
    settings = LossConfig.model_validate({"reweight": form} | config)
    return reweighted_advantage(
        double(advantage),
        double(LOG_P),
        double(LOG_P + gap),
        strength,
        settings,
        None if factor is None else double(factor),
        None if contrast is None else double(contrast),
    ).item()


@given(st.floats(-3, 3), st.floats(-0.69, 0.69), st.floats(0, 1))
def test_rlrts_weights_invert_rlsds(advantage, gap, strength):
    # Where the clip does not bind, the factors minus 1 − λ are λ w and λ / w.
    wide = {"reweight_clip": 1.0}
    rlsd = modulated("ratio", advantage, gap, strength, **wide)
    rlrt = modulated("inverse", advantage, gap, strength, **wide)
    kept = advantage * (1 - strength)
    assert (rlsd - kept) * (rlrt - kept) == pytest.approx((strength * advantage) ** 2, abs=1e-9)
    assert modulated("inverse", advantage, gap) == modulated("ratio", advantage, -gap)


def test_rlrt_reinforces_what_the_teacher_finds_unlikely():
    # λ ½, ε 0.2: 1 ± 0.1 of A.
    for advantage in (1.0, -1.0):
        assert modulated("inverse", advantage, -advantage * 5) == pytest.approx(1.1 * advantage)
        assert modulated("inverse", advantage, advantage * 5) == pytest.approx(0.9 * advantage)
    # ε = 1, for a base model: between ½ A and 3/2 A.
    assert modulated("inverse", 1.0, -5, reweight_clip=1.0) == pytest.approx(1.5)
    assert modulated("inverse", 1.0, 50, reweight_clip=1.0) == pytest.approx(0.5)


def test_bounded_by_hand():
    # r = ½ tanh(0.01 / 0.02) = 0.231059.
    change = 0.5 * tanh(0.5)
    settings = {"reweight_scale": 0.02, "reweight_threshold": 0.02}
    assert modulated("bounded", 1.0, 0.01, **settings) == pytest.approx(1 + change)
    assert modulated("bounded", -1.0, 0.01, **settings) == pytest.approx(-1 + change)
    # It ends at 0, and 0 stays 0.
    assert modulated("bounded", -0.1, 0.01, **settings) == 0
    assert modulated("bounded", 0.1, -0.01, **settings) == 0
    assert modulated("bounded", 0.0, 5.0, **settings) == 0
    # ½ tanh(0.0004 / 0.02) = 0.01 is at most the threshold.
    assert modulated("bounded", 1.0, 0.0004, **settings) == 1
    assert modulated("bounded", 1.0, 0.0009, **settings) > 1


@given(st.floats(-3, 3), st.floats(-50, 50), st.floats(0, 2), st.floats(-2, 2))
def test_bounded_never_flips_the_advantages_sign(advantage, gap, strength, factor):
    found = modulated("bounded", advantage, gap, strength, factor, reweight_scale=0.02)
    assert found * advantage >= 0
    assert abs(found - advantage) <= strength * abs(factor) + 1e-12


@given(st.floats(-3, 3), st.floats(-4, 4), st.floats(-4, 0))
def test_a_contrast_is_nil_where_both_hints_shift_alike(advantage, gap, under_both):
    # The student's own log-probability does not count.
    alike = LOG_P + gap
    for form in REWEIGHTS:
        settings = {"reweight_clip": 0.2}
        found = modulated(form, advantage, gap, contrast=alike, **settings)
        assert found == pytest.approx(advantage)
    apart = modulated("bounded", 5.0, gap, contrast=under_both)
    assert apart == pytest.approx(5.0 + 0.5 * tanh(alike - under_both))


def test_one_sided_by_hand():
    settings = {"reweight_clip": 5.0, "reweight_threshold": 0.5}
    assert modulated("one_sided", 1.0, 2.0, 0.2, **settings) == pytest.approx(1 + 0.2 * 1.5)
    assert modulated("one_sided", 1.0, 9.0, 0.2, **settings) == pytest.approx(1 + 0.2 * 4.5)
    assert modulated("one_sided", 1.0, -9.0, 0.2, **settings) == 1
    assert modulated("one_sided", 1.0, 0.4, 0.2, **settings) == 1
    assert modulated("one_sided", -1.0, -2.0, 0.2, **settings) == pytest.approx(-1 - 0.2 * 1.5)
    assert modulated("one_sided", -1.0, 2.0, 0.2, **settings) == -1
    assert modulated("one_sided", 0.0, 2.0, 0.2, **settings) == 0


@pytest.mark.parametrize("form", REWEIGHTS)
def test_a_factor_multiplies_lambda(form):
    for factor in (0.0, 0.3, 1.0):
        found = modulated(form, 1.0, 1.1, 0.5, factor)
        assert found == pytest.approx(modulated(form, 1.0, 1.1, 0.5 * factor))
    assert modulated(form, 1.0, 1.1, 0.5, 0.0) == 1.0


def test_a_negative_factor_turns_bounded_round():
    # DASD's repelled tokens: a factor of −1 subtracts what 1 adds.
    up, down = (modulated("bounded", 5.0, 1.0, factor=sign) for sign in (1.0, -1.0))
    assert up - 5 == pytest.approx(5 - down)
    assert up == pytest.approx(5 + 0.5 * tanh(1.0))


@pytest.mark.parametrize("form", REWEIGHTS)
def test_every_form_stays_finite_where_one_side_rules_a_token_out(form):
    for gap in (-1e4, 1e4):
        for advantage in (-1.0, 0.0, 1.0):
            assert abs(modulated(form, advantage, gap)) < exp(3)
