"""Each preset's gradient, token by token, from its routed table to its closed form.

At ratio 1 and weight 1 a token's gradient in its logits is one of, or a mixture of, the closed
forms of preset_step.py. This file has TRACE and the first baselines, test_preset_methods.py the
methods since.
"""

import pytest
import torch
from torch.testing import assert_close

from trace_opd.schemas.configs import ConvertConfig, TrainConfig
from trace_opd.schemas.settings import load_config
from trace_opd.tests.trace.preset_step import RIGHT, TOKENS, WRONG, Response, gradients_of

KEY, ERROR, ALL, NONE = [3, 4], [0, 1], list(range(TOKENS)), []


@pytest.fixture(name="step_of")
def _step_of(example):
    """`(preset, step) -> responses`: a correct and a wrong one, each with a peer of its kind."""

    def step_of(preset: str, step: int = 0) -> list[Response]:
        routing = load_config(ConvertConfig, None, [], preset=preset).routing
        config = load_config(TrainConfig, None, ["online.steps=1"], preset=preset)
        rows = example(RIGHT, WRONG, RIGHT | {"text": "gh\nij\nkl"}).routed(routing)[:2]
        return [gradients_of(row, config, step) for row in rows]

    return step_of


def assert_split(response: Response, inside: torch.Tensor, outside: torch.Tensor) -> None:
    """Routed tokens have one gradient, the other tokens another."""
    expected = outside.clone()
    expected[response.routed] = inside[response.routed]
    assert_close(response.gradient, expected)


def test_grpo_is_grpo_on_every_token(step_of):
    for response in step_of("grpo"):
        assert response.advantage != 0
        assert_split(response, response.grpo, response.grpo)


@pytest.mark.parametrize(
    ("preset", "key", "error"),
    [
        ("trace-fkl", "forward_kl", None),
        ("trace-rkl", None, "reverse_kl"),
        ("trace-both", "forward_kl", "reverse_kl"),
        ("all-token-fkl", "forward_kl", "forward_kl"),
        ("all-token-rkl", "reverse_kl", "reverse_kl"),
        ("random-alpha", "forward_kl", None),
        ("inverted-alpha", "forward_kl", None),
    ],
)
def test_self_distillation_mixes_its_kl_with_grpo_along_the_schedule(step_of, preset, key, error):
    # λ: ½ up to step 10, ¼ at step 25, 0 from step 40 on. GRPO on routed tokens: 1 − λ / ½.
    for step, lam, fade in ((0, 0.5, 0.0), (10, 0.5, 0.0), (25, 0.25, 0.5), (40, 0.0, 1.0)):
        for response, action in zip(step_of(preset, step), (key, error), strict=True):
            assert bool(response.routed) is (action is not None)
            kl = getattr(response, action) if action else torch.zeros(())
            assert_split(response, fade * response.grpo + lam * kl, response.grpo)


@pytest.mark.parametrize(
    ("preset", "right", "wrong"),
    [
        ("trace-fkl", KEY, NONE),
        ("trace-rkl", NONE, ERROR),
        ("trace-both", KEY, ERROR),
        ("all-token-fkl", ALL, ALL),
        ("sdpo", ALL, ALL),
        ("srpo", NONE, ALL),
        ("rlsd", ALL, ALL),
        ("opsd-v1", ALL, ALL),
    ],
)
def test_the_tokens_that_a_preset_routes(step_of, preset, right, wrong):
    assert [response.routed for response in step_of(preset)] == [right, wrong]


@pytest.mark.parametrize("step", [0, 40, 100_000])
def test_sdpo_is_jsd_on_every_token_without_grpo_at_any_step(step_of, step):
    for response in step_of("sdpo", step):
        assert response.advantage != 0
        assert_close(response.gradient, response.jsd)


@pytest.mark.parametrize("step", [0, 40, 100_000])
def test_the_first_opsd_is_p_minus_q_on_every_token_without_grpo_at_any_step(step_of, step):
    for response in step_of("opsd-v1", step):
        assert response.advantage != 0
        assert_close(response.gradient, response.p - response.q)


@pytest.mark.parametrize("step", [0, 40, 100_000])
def test_srpo_is_grpo_on_right_and_entropy_weighted_jsd_on_wrong_responses(step_of, step):
    right, wrong = step_of("srpo", step)
    assert_close(right.gradient, right.grpo)
    entropy = -(wrong.q * wrong.q.log()).sum(-1, keepdim=True)
    assert_close(wrong.gradient, torch.exp(-entropy) * wrong.jsd)


@pytest.mark.parametrize(("step", "lam"), [(0, 0.5), (25, 0.25), (50, 0.0), (99, 0.0)])
def test_rlsd_is_grpo_times_the_teachers_bounded_likelihood_ratio(step_of, step, lam):
    factors = []
    for response in step_of("rlsd", step):
        ratio = (response.q / response.p)[response.onehot.bool()]
        evidence = ratio if response.advantage > 0 else 1 / ratio
        factor = 1 - lam + lam * evidence.clamp(0.8, 1.2)
        assert_close(response.gradient, factor[:, None] * response.grpo)
        factors.append(factor)
    spread = torch.cat(factors)
    assert (spread.min() >= 1 - 0.2 * lam) & (spread.max() <= 1 + 0.2 * lam)
    assert (spread.std() > 0) == (lam > 0)
