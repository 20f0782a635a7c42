"""λ over the steps: METHOD.md's schedule."""

from itertools import pairwise

import pytest

from trace_opd.schemas.configs import ScheduleConfig
from trace_opd.trace.schedule import grpo_weight, kl_weight, teaches_from

PAPER = ScheduleConfig()  # w0 = 0.5 for 10 steps, then linear to 0 over 30


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (9, 0.5), (10, 0.5), (25, 0.25), (39, 0.5 / 30), (40, 0.0), (1000, 0.0)],
)
def test_the_papers_schedule_holds_for_10_steps_and_is_0_from_step_40_on(step, expected):
    assert kl_weight(step, PAPER) == pytest.approx(expected, abs=1e-15)


def test_from_step_40_on_the_weight_is_exactly_0_so_that_no_teacher_is_needed():
    assert [kl_weight(step, PAPER) for step in range(40, 60)] == [0.0] * 20


def test_each_decay_step_takes_off_the_same():
    weights = [kl_weight(step, PAPER) for step in range(10, 41)]
    drops = [a - b for a, b in pairwise(weights)]
    assert drops == pytest.approx([0.5 / 30] * 30)


def test_the_exposure_of_the_papers_schedule_is_finite_and_known():
    # 10 · 0.5² + (0.5/30)² · Σ_{i=1}^{30} i² = 2.5 + 9455 / 3600
    total = sum(kl_weight(step, PAPER) ** 2 for step in range(10_000))
    assert total == pytest.approx(2.5 + 9455 / 3600)


def test_without_hold_and_decay_the_weight_is_0_from_the_first_step():
    assert kl_weight(0, ScheduleConfig(hold_steps=0, decay_steps=0)) == 0.0


def test_without_decay_the_weight_drops_at_the_end_of_the_hold():
    config = ScheduleConfig(w0=0.3, hold_steps=2, decay_steps=0)
    assert [kl_weight(step, config) for step in range(4)] == [0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize(("kl", "expected"), [(0.5, 0.0), (0.25, 0.5), (0.0, 1.0)])
def test_grpo_returns_to_routed_tokens_as_the_kl_fades(kl, expected):
    assert grpo_weight(kl, PAPER) == expected


def test_with_w0_of_0_grpo_weighs_routed_tokens_fully():
    assert grpo_weight(0.0, ScheduleConfig(w0=0.0)) == 1.0


@pytest.mark.parametrize("kl", [0.5, 0.25, 0.0])
def test_kept_grpo_and_the_kl_add_up(kl):
    assert grpo_weight(kl, ScheduleConfig(grpo="keep")) == 1.0


def test_the_schedule_begins_at_the_start_step():
    later = ScheduleConfig(start_step=7)
    assert [kl_weight(step, later) for step in range(7)] == [0.0] * 7
    assert [kl_weight(step + 7, later) for step in range(50)] == [
        kl_weight(step, PAPER) for step in range(50)
    ]
    assert grpo_weight(0.0, later) == 1.0


@pytest.mark.parametrize(
    ("config", "last"),
    [
        (ScheduleConfig(start_step=5, hold_steps=2, decay_steps=3), 9),
        (ScheduleConfig(hold_steps=2, decay_steps=0), 1),
        (ScheduleConfig(start_step=5, hold_steps=0, decay_steps=0), -1),
        (ScheduleConfig(start_step=5, w0=0.0), -1),
        (ScheduleConfig(start_step=5, decay_steps=None), 99),
    ],
)
def test_a_teacher_is_kept_until_no_later_step_has_a_weight(config, last):
    weighted = [kl_weight(step, config) > 0 for step in range(100)]
    kept = [teaches_from(step, config) for step in range(100)]
    assert kept == [any(weighted[step:]) for step in range(100)]
    assert kept == [step <= last for step in range(100)]
