"""Rewards and group-normalised advantages on worked examples."""

import numpy as np
import pytest

from trace_opd.schemas.configs import RoutingConfig
from trace_opd.trace.routed import group_advantages, groups_without_signal, overlong_penalty


def test_one_right_of_four_by_hand():
    # mean 1/4; sample variance (9/16 + 3 · 1/16) / 3 = 1/4, so std 1/2.
    advantages = group_advantages(np.array([1.0, 0, 0, 0]), ["g"] * 4, eps=0.1)
    assert advantages == pytest.approx([0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6])


def test_each_group_is_normalised_by_itself_whatever_the_order():
    rewards = np.array([1.0, 5.0, 0.0, 7.0])
    advantages = group_advantages(rewards, ["a", "b", "a", "b"], eps=1e-9)
    # Two values d apart: the mean is in the middle, the sample std is d/√2, so ±1/√2.
    assert advantages == pytest.approx([2**-0.5, -(2**-0.5), -(2**-0.5), 2**-0.5])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_of_equal_rewards_gets_exactly_0(reward):
    assert (group_advantages(np.full(8, reward), ["g"] * 8, 1e-4) == 0).all()


def test_a_group_of_one_gets_0():
    assert group_advantages(np.array([1.0, 0.0]), ["a", "b"], 1e-4).tolist() == [0.0, 0.0]


def test_advantages_of_a_group_sum_to_0():
    rewards = np.random.default_rng(0).integers(0, 2, 64).astype(float)
    groups = [f"g{i % 8}" for i in range(64)]
    advantages = group_advantages(rewards, groups, 1e-4)
    for group in set(groups):
        assert sum(a for a, g in zip(advantages, groups, strict=True) if g == group) == (
            pytest.approx(0, abs=1e-5)
        )


def test_advantages_are_float32_in_the_rewards_order():
    advantages = group_advantages(np.array([0.0, 1.0]), [3, 3], 1e-4)
    assert advantages.dtype == np.float32
    assert advantages[0] < 0 < advantages[1]


# --- normalisation ---


def test_without_the_standard_deviation_advantages_are_the_distance_to_the_mean():
    rewards = np.array([1.0, 0, 0, 0])
    advantages = group_advantages(rewards, ["g"] * 4, eps=0.1, normalisation="mean")
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("normalisation", ["std", "mean"])
def test_equal_rewards_whose_floating_point_mean_is_another_number_get_exactly_0(normalisation):
    rewards = np.full(3, 0.1)
    assert rewards.sum() / 3 != 0.1
    assert group_advantages(rewards, ["g"] * 3, 1e-4, normalisation).tolist() == [0, 0, 0]


def test_no_rewards_give_no_advantages():
    assert group_advantages(np.array([]), [], 1e-4).shape == (0,)


# --- overlong ---


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (30, -1.0)],
)
def test_the_soft_penalty_falls_linearly_over_the_buffer_before_the_limit(length, penalty):
    assert overlong_penalty(length, limit=20, buffer=8) == penalty


def test_a_buffer_above_the_limit_counts_as_the_limit():
    assert [overlong_penalty(n, limit=4, buffer=256) for n in range(1, 5)] == [
        -0.25,
        -0.5,
        -0.75,
        -1.0,
    ]


# --- signal ---

RIGHT, WRONG = {"text": "1", "correct": True}, {"text": "0", "correct": False}


def silent(example, *samples, **config) -> list[str]:
    made = example(*samples)
    return groups_without_signal(made.rollouts, made.verdicts, RoutingConfig(**config))


def test_groups_of_equal_rewards_have_no_signal(example):
    groups = {
        "mixed": [RIGHT, WRONG],
        "right": [RIGHT, RIGHT],
        "wrong": [WRONG, WRONG],
        "unscored": [{"text": "1", "correct": None}] * 2,
        "one scored": [RIGHT, {"text": "1", "correct": None}],
    }
    samples = [sample | {"group": name} for name, group in groups.items() for sample in group]
    assert silent(example, *samples) == ["right", "wrong", "unscored", "one scored"]


def test_a_soft_penalty_can_be_a_groups_signal(example):
    long = {"text": "1" * 18, "correct": True}
    assert silent(example, RIGHT, long) == ["g"]
    assert silent(example, RIGHT, long, overlong="soft", overlong_buffer=8) == []
