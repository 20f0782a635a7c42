"""Training sequences: from a routed table's rows to the tensors of a micro-batch.

trainer.py calls these functions in each step: a table's rows become sequences, batches.py cuts them
into micro-batches, and each micro-batch becomes packed rows (packing.py), the student's and the
teacher's, and the inputs of the loss (losses.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from ..schemas.configs import PromptConfig
from ..schemas.labels import Route
from .losses import LossInputs
from .packing import PackedRow, pack
from .prompt import render_chat, teacher_chat
from .transfer import to_device

# Columns of a routed table that are fields of a sequence, and those that a teacher's prompt needs.
_FIELDS = ("rollout_id", "group_id", "advantage", "reward", "correct", "temperature", "truncated")
_TAUGHT = ("problem", "diagnostic_type", "teacher_context")


@dataclass(frozen=True)
class TrainingSequence:
    """One routed response. Arrays are (response tokens,); prompts are token ids.

    token_ids: integers; logprobs: float32; route: uint8. The table's own memory, not to be written.
    """

    rollout_id: str
    group_id: str
    prompt_ids: list[int]
    token_ids: np.ndarray
    logprobs: np.ndarray
    route: np.ndarray
    advantage: float
    reward: float
    correct: bool
    temperature: float
    truncated: bool
    teacher_prompt_ids: list[int] | None

    @property
    def routed_positions(self) -> np.ndarray:
        """Response positions whose route is not GRPO, ascending."""
        return np.flatnonzero(self.route != int(Route.GRPO))

    @property
    def routed_end(self) -> int:
        """One past the last routed token: the teacher reads no further."""
        positions = self.routed_positions
        return int(positions[-1]) + 1 if len(positions) else 0


def training_sequences(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    with_teacher: bool = True,
) -> list[TrainingSequence]:
    """The rows of a routed table; those with routed tokens get the teacher's prompt.

    with_teacher: false once λ is 0, when no teacher reads a prompt.
    """
    arrays = (_views(table[name]) for name in ("token_ids", "logprobs", "route"))
    prompts = [ids.tolist() for ids in _views(table["prompt_token_ids"])]
    sequences = []
    for row, (fields, prompt_ids, token_ids, logprobs, route) in enumerate(
        zip(table.select(_FIELDS).to_pylist(), prompts, *arrays, strict=True)
    ):
        teacher_prompt_ids = None
        if with_teacher and route.any():
            messages = teacher_chat(prompt, *(table[name][row].as_py() for name in _TAUGHT))
            teacher_prompt_ids = render_chat(tokenizer, messages, prompt.thinking)
        sequences.append(
            TrainingSequence(
                **fields,
                prompt_ids=prompt_ids,
                token_ids=token_ids,
                logprobs=logprobs,
                route=route,
                teacher_prompt_ids=teacher_prompt_ids,
            )
        )
    return sequences


def _views(column: Any) -> list[np.ndarray]:
    """The lists of an Arrow column, read-only and without a copy of a chunk's values."""
    return [
        values[first:end]
        for lists in column.chunks
        for values in [lists.values.to_numpy()]
        for first, end in pairwise(lists.offsets.to_numpy().tolist())
    ]


def signal_groups(sequences: Sequence[TrainingSequence]) -> set[str]:
    """Ids of groups whose rewards differ; all advantages of the other groups are 0."""
    rewards: dict[str, set[float]] = {}
    for sequence in sequences:
        rewards.setdefault(sequence.group_id, set()).add(sequence.reward)
    return {group for group, distinct in rewards.items() if len(distinct) > 1}


def student_row(rows: Sequence[TrainingSequence]) -> PackedRow:
    """The student's packed row: prompt and response of each sequence."""
    return pack([row.prompt_ids for row in rows], [row.token_ids for row in rows])


def teacher_row(rows: Sequence[TrainingSequence]) -> PackedRow:
    """The teacher's packed row of sequences with routed tokens.

    Its own prompt, then the response up to the last routed token. The states at routed tokens are
    kept, in the order of `rows`.
    """
    return pack(
        [row.teacher_prompt_ids or [] for row in rows],
        [row.token_ids[: row.routed_end] for row in rows],
        [row.routed_positions for row in rows],
    )


def loss_inputs(
    rows: Sequence[TrainingSequence], weights: Sequence[float], device: torch.device
) -> LossInputs:
    """The loss's inputs per token; weights: one per sequence, global to the step."""
    lengths = np.array([len(row.token_ids) for row in rows])
    # Samplers report greedy tokens' log-probabilities at temperature 1.
    temperatures = [row.temperature or 1.0 for row in rows]
    route = np.concatenate([row.route for row in rows])

    def flat(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts, dtype=dtype)), device)

    def per_token(values: Sequence[float]) -> torch.Tensor:
        spread = np.repeat(np.asarray(values, np.float32), lengths)
        return to_device(torch.from_numpy(spread), device)

    return LossInputs(
        token_ids=flat([row.token_ids for row in rows], np.int64),
        old_logprobs=flat([row.logprobs for row in rows], np.float32),
        advantage=per_token([row.advantage for row in rows]),
        weight=per_token(weights),
        temperature=per_token(temperatures),
        route=to_device(torch.from_numpy(route), device),
        host_route=route,
        heated=any(temperature != 1 for temperature in temperatures),
    )
