"""The schedule: the KL weight λ over optimiser steps. trainer.py asks it at each step."""

from ..schemas.configs import ScheduleConfig


def kl_weight(step: int, config: ScheduleConfig) -> float:
    """λ_k at step k, counted from 0 (METHOD.md, "Schedule").

    With k counted from start_step: 0 before it, w0 while k < hold, then w0 · (hold + decay − k) /
    decay, and 0 from k = hold + decay. Without decay_steps λ stays at w0.
    """
    step -= config.start_step
    if step < 0:
        return 0.0
    if config.decay_steps is None or step < config.hold_steps:
        return config.w0
    remaining = config.hold_steps + config.decay_steps - step
    return config.w0 * remaining / config.decay_steps if remaining > 0 else 0.0


def teaches_from(step: int, config: ScheduleConfig) -> bool:
    """Whether λ is above 0 at this step or at a later one: until then the teacher is kept."""
    return kl_weight(max(step, config.start_step), config) > 0


def grpo_weight(kl: float, config: ScheduleConfig) -> float:
    """Weight of GRPO on routed tokens, 1 − λ_k / w0: they return to GRPO as the KL fades.

    Under `schedule.grpo: keep` it is 1.
    """
    if config.grpo == "keep":
        return 1.0
    return 1.0 - kl / config.w0 if config.w0 else 1.0
