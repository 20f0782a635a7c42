"""Group-normalised advantages on worked examples."""

import numpy as np
import pytest

from trace_opd.trace.advantage import group_advantages


def test_one_right_of_four_by_hand():
    # mean 1/4; sample variance (9/16 + 3 · 1/16) / 3 = 1/4, so std 1/2.
    advantages = group_advantages(np.array([1.0, 0, 0, 0]), ["g"] * 4, eps=0.1)
    assert advantages == pytest.approx([0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6])


def test_each_group_is_normalised_by_itself_whatever_the_order():
    rewards = np.array([1.0, 5.0, 0.0, 7.0])
    advantages = group_advantages(rewards, ["a", "b", "a", "b"], eps=1e-9)
    # Two values d apart: mean in the middle, sample std d/√2, so ±1/√2.
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
