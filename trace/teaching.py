"""The teacher's passes before a student's: states at routed tokens, and scores for a contrast.

trainer.py calls both functions for each micro-batch while λ > 0. Sharded passes are collective, so
a rank with fewer rows than another one runs the teacher on a token (`MicroBatch.teacher_passes`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from .batches import MicroBatch
from .fused import token_logprobs
from .losses import Head, LossInputs
from .packing import pack
from .sequences import Contrast, contrast_row, teacher_row
from .transfer import to_device

# A packed row and the use of its states and head; see PackedModel.
Teacher = Callable[..., Any]


@torch.no_grad()
def teacher_states(teacher: Teacher, batch: MicroBatch) -> tuple[torch.Tensor | None, Head | None]:
    """The teacher's states at routed tokens, (routed, hidden), and its head; None without any."""
    states: list[torch.Tensor] = []
    head = None
    for rows in batch.taught:
        own, head = teacher(teacher_row(rows), lambda states, head: (states, head))
        states.append(own)
    _keep_step(teacher, batch.teacher_passes - len(batch.taught))
    return (torch.cat(states), head) if states else (None, None)


@torch.no_grad()
def contrast_logprobs(
    teacher: Teacher,
    batch: MicroBatch,
    inputs: LossInputs,
    temperature: float | None,
    fp32_logits: bool,
) -> torch.Tensor | None:
    """Log-probabilities of the sampled tokens under the contrast's prompts, (tokens,) float32.

    Of several prompts the mean of the probabilities: logsumexp − log K. 0 at tokens that have no
    contrast; None if no token has one. temperature: divides the logits; None: the inputs'.
    """
    starts = np.cumsum([0, *(row.policy_tokens for row in batch.rows)])
    start_of = {row.rollout_id: int(at) for row, at in zip(batch.rows, starts, strict=False)}
    device = inputs.token_ids.device
    found: list[torch.Tensor] = []
    places: list[np.ndarray] = []  # of `found`, in the table below
    total, most = int(starts[-1]), 1

    def score(states: torch.Tensor, head: Head, at: np.ndarray) -> torch.Tensor:
        own = to_device(torch.from_numpy(at), device)
        heat = inputs.temperature[own]
        if temperature is not None:
            heat = torch.full_like(heat, temperature)
        return token_logprobs(states, head, inputs.token_ids[own], heat, fp32_logits)

    for rows in batch.contrasts:
        at = np.concatenate([start_of[r.sequence.rollout_id] + _positions(r) for r in rows])
        found.append(teacher(contrast_row(rows), partial(score, at=at)))
        numbers = np.repeat([row.number for row in rows], [len(_positions(row)) for row in rows])
        places.append(numbers * total + at)
        most = max(most, int(numbers.max()) + 1)
    _keep_step(teacher, batch.contrast_passes - len(batch.contrasts))
    if not found:
        return None
    # A sequence's k-th prompt is in row k; −∞ where it has fewer.
    table = torch.full((most * total,), -math.inf, dtype=found[0].dtype, device=device)
    table[to_device(torch.from_numpy(np.concatenate(places)), device)] = torch.cat(found)
    table = table.view(most, total)
    scored = table[0] > -math.inf  # a scored token is never −∞: see losses.FLOOR
    means = torch.logsumexp(table, 0) - (table > -math.inf).sum(0).clamp(min=1).log()
    return torch.where(scored, means, 0.0)


def _positions(row: Contrast) -> np.ndarray:
    """Among the tokens that the policy wrote, as the loss's inputs are."""
    return row.sequence.places(row.sequence.contrast_positions)


def _keep_step(teacher: Teacher, passes: int) -> None:
    """Passes in step with other ranks, which run their teachers."""
    for _ in range(passes):
        teacher(pack([[0]], [np.array([0])], [np.array([], int)]), lambda *_: None)
