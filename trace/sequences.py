"""Training sequences: from a routed table's rows to the tensors of a micro-batch.

trainer.py calls these functions in each step: a table's rows become sequences, batches.py cuts them
into micro-batches, and each micro-batch becomes packed rows (packing.py), the student's and the
teacher's, and the inputs of the loss (losses.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from ..schemas.configs import LossConfig, PromptConfig
from ..schemas.conversation import COLUMN, History, history_key
from ..schemas.labels import Route, Signal
from .contexts import NO_CONTEXT
from .losses import LossInputs, Scores
from .packing import PackedRow, pack
from .prompt import TeacherTurn, render_chat, teacher_chat, teacher_turn
from .scores import JOINED, NOTHING, SequenceScores, sequence_scores
from .transfer import to_device

# Columns of a routed table that are fields of a sequence, and those that a teacher's prompt needs.
_FIELDS = ("rollout_id", "group_id", "advantage", "reward", "correct", "temperature", "truncated")
_TAUGHT = ("problem", "diagnostic_type", "teacher_context")
_CONTRASTS = "contrast_contexts"
_MASK = "policy_mask"


@dataclass(frozen=True)
class TrainingSequence:
    """One routed response. Arrays are (response tokens,); prompts are token ids.

    token_ids: integers; logprobs: float32; route: uint8. The table's own memory, not to be written.
    contrast_prompt_ids: the teacher's prompts with `routing.contrast_context`. scores: those of the
    routed tokens, if the table has some (scores.py). policy_mask: bool, whether the policy wrote a
    token; None: it wrote all. Others are read by the models and are no part of the loss.
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
    contrast_prompt_ids: tuple[list[int], ...] = ()
    scores: SequenceScores | None = None
    policy_mask: np.ndarray | None = None

    @property
    def policy_tokens(self) -> int:
        """Response tokens that the policy wrote: |y| of the loss."""
        mask = self.policy_mask
        return len(self.token_ids) if mask is None else int(np.count_nonzero(mask))

    def written(self, values: np.ndarray) -> np.ndarray:
        """Of (response tokens,) values those of the tokens that the policy wrote."""
        return values if self.policy_mask is None else values[self.policy_mask]

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where tokens that the policy wrote are among those; positions: in the response."""
        if self.policy_mask is None:
            return positions
        return np.cumsum(self.policy_mask)[positions] - 1

    @property
    def routed_positions(self) -> np.ndarray:
        """Response positions whose route is not GRPO, ascending."""
        return np.flatnonzero(self.route != int(Route.GRPO))

    @property
    def routed_end(self) -> int:
        """One past the last routed token: the teacher reads no further."""
        positions = self.routed_positions
        return int(positions[-1]) + 1 if len(positions) else 0

    @property
    def contrast_positions(self) -> np.ndarray:
        """Response positions that a contrast scores: those whose route compares teachers."""
        return np.flatnonzero(self.route == int(Route.REWEIGHT))

    @property
    def contrast_end(self) -> int:
        """One past the last of them, 0 without a contrast."""
        positions = self.contrast_positions
        return int(positions[-1]) + 1 if self.contrast_prompt_ids and len(positions) else 0


class Contrast(NamedTuple):
    """A sequence under one of its contrast's prompts; number: which."""

    sequence: TrainingSequence
    number: int

    @property
    def prompt_ids(self) -> list[int]:
        return self.sequence.contrast_prompt_ids[self.number]


def training_sequences(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    with_teacher: bool = True,
) -> list[TrainingSequence]:
    """The rows of a routed table; those with routed tokens get the prompts of the teacher and of
    its contrast. A first token that the teacher can't teach is GRPO's (`prompt.teacher_turn`).

    with_teacher: false while λ is 0, when no teacher reads a prompt.
    """
    arrays = (_views(table[name]) for name in ("token_ids", "logprobs", "route"))
    prompts = [ids.tolist() for ids in _views(table["prompt_token_ids"])]
    turn = teacher_turn(tokenizer, prompt) if with_teacher else TeacherTurn(None, True)
    contrasted = with_teacher and _CONTRASTS in table.column_names
    rendered = Rendered(tokenizer, prompt, turn)
    histories = table[COLUMN].to_pylist() if COLUMN in table.column_names else [None] * len(table)
    masks = _masks(table)
    scored: Any = [None] * len(table)
    if JOINED[0] in table.column_names:
        scored = list(map(sequence_scores, *(_views(table[name]) for name in JOINED)))
    sequences = []
    for row, (fields, prompt_ids, token_ids, logprobs, route, scores) in enumerate(
        zip(table.select(_FIELDS).to_pylist(), prompts, *arrays, scored, strict=True)
    ):
        teacher_prompt_ids, contrasts = None, ()
        left_out = scores is not None and len(scores.tail) < np.count_nonzero(route)
        if (left_out or not turn.first_token) and route[0]:
            route = route.copy()
            route[0] = int(Route.GRPO)
        if with_teacher and route.any():
            problem, label, context = (table[name][row].as_py() for name in _TAUGHT)
            asked = prompt_ids, problem, histories[row], label
            teacher_prompt_ids = rendered(*asked, context)
            texts = table[_CONTRASTS][row].as_py() or () if contrasted else ()
            contrasts = tuple(rendered(*asked, text) for text in texts)
        sequences.append(
            TrainingSequence(
                **fields,
                prompt_ids=prompt_ids,
                token_ids=token_ids,
                logprobs=logprobs,
                route=route,
                teacher_prompt_ids=teacher_prompt_ids,
                contrast_prompt_ids=contrasts,
                scores=scores,
                policy_mask=masks[row],
            )
        )
    return sequences


@dataclass(frozen=True)
class Rendered:
    """Renders a row's teacher prompts. A prompt that rows share is rendered once."""

    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    turn: TeacherTurn
    known: dict[Any, list[int]] = field(default_factory=dict)

    def __call__(
        self,
        prompt_ids: list[int],
        problem: str,
        history: History,
        label: str | None,
        context: str | None,
    ) -> list[int]:
        """prompt_ids: the student's, which is the teacher's without context."""
        if context == NO_CONTEXT and self.turn.thinking == self.prompt.thinking:
            return prompt_ids
        asked = (problem, history_key(history), label if context is None else None, context)
        if asked not in self.known:
            messages = teacher_chat(self.prompt, problem, label, context, history)
            self.known[asked] = render_chat(self.tokenizer, messages, self.turn.thinking)
        return self.known[asked]


def _views(column: Any) -> list[np.ndarray]:
    """The lists of an Arrow column, read-only and without a copy of a chunk's values."""
    return [
        values[first:end]
        for lists in column.chunks
        for values in [lists.values.to_numpy()]
        for first, end in pairwise(lists.offsets.to_numpy().tolist())
    ]


def _masks(table: pa.Table) -> list[np.ndarray | None]:
    """Each row's policy_mask; None where the policy wrote all of the response."""
    if _MASK not in table.column_names:
        return [None] * len(table)
    masks = (np.array(lists, dtype=bool) for lists in table[_MASK].to_pylist())
    return [None if mask.all() else mask for mask in masks]


def signal_groups(sequences: Sequence[TrainingSequence]) -> set[str]:
    """Ids of groups whose rewards differ; all advantages of the other groups are 0."""
    rewards: dict[str, set[float]] = {}
    for sequence in sequences:
        rewards.setdefault(sequence.group_id, set()).add(sequence.reward)
    return {group for group, distinct in rewards.items() if len(distinct) > 1}


def student_row(rows: Sequence[TrainingSequence]) -> PackedRow:
    """The student's packed row: prompt and response of each sequence.

    The states at tokens that the policy wrote are kept, in the order of `rows`.
    """
    kept = None
    if any(row.policy_mask is not None for row in rows):
        kept = [row.written(np.arange(len(row.token_ids))) for row in rows]
    return pack([row.prompt_ids for row in rows], [row.token_ids for row in rows], kept)


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


def contrast_row(rows: Sequence[Contrast]) -> PackedRow:
    """The teacher's packed row of sequences under a contrast's prompts, as `teacher_row`."""
    return pack(
        [row.prompt_ids for row in rows],
        [row.sequence.token_ids[: row.sequence.contrast_end] for row in rows],
        [row.sequence.contrast_positions for row in rows],
    )


def loss_inputs(
    rows: Sequence[TrainingSequence],
    weights: Sequence[float],
    device: torch.device,
    config: LossConfig | None = None,
) -> LossInputs:
    """The loss's inputs per token that the policy wrote, of those that only some configs need the
    ones of this config.

    weights: one per sequence, global to the step.
    """
    config = config or LossConfig()
    lengths = np.array([row.policy_tokens for row in rows])
    # Samplers report greedy tokens' log-probabilities at temperature 1.
    temperatures = [row.temperature or 1.0 for row in rows]
    route = np.concatenate([row.written(row.route) for row in rows])

    def flat(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        joined = np.concatenate(parts, dtype=dtype, casting="same_kind")
        return to_device(torch.from_numpy(joined), device)

    def per_token(values: Sequence[float]) -> torch.Tensor:
        spread = np.repeat(np.asarray(values, np.float32), lengths)
        return to_device(torch.from_numpy(spread), device)

    optional: dict[str, Any] = {}
    if any(gate.of is Signal.POSITION for gate in config.gates):
        places = [(np.arange(n) + 0.5) / n for n in lengths.tolist()]
        optional["position"] = flat(places, np.float32)
    if (config.key_weight, config.error_weight) != (1.0, 1.0):
        sizes = [config.key_weight if row.correct else config.error_weight for row in rows]
        optional["kl_scale"] = per_token(sizes)
    if config.policy == "gspo":
        numbers = np.repeat(np.arange(len(rows)), lengths)
        optional["sequence"] = to_device(torch.from_numpy(numbers), device)
    if scored := [row.scores for row in rows if row.scores is not None]:
        optional["scores"] = Scores(
            token_ids=flat([one.token_ids for one in scored], np.int64),
            logprobs=_mapped(flat([one.logprobs for one in scored], np.float32)),
            tail=_mapped(flat([one.tail for one in scored], np.float32)),
            sampled=_mapped(flat([one.sampled for one in scored], np.float32)),
        )
    return LossInputs(
        **optional,
        token_ids=flat([row.written(row.token_ids) for row in rows], np.int64),
        old_logprobs=flat([row.written(row.logprobs) for row in rows], np.float32),
        advantage=per_token([row.advantage for row in rows]),
        weight=per_token(weights),
        temperature=per_token(temperatures),
        route=to_device(torch.from_numpy(route), device),
        host_route=route,
        heated=any(temperature != 1 for temperature in temperatures),
    )


def _mapped(logprobs: torch.Tensor) -> torch.Tensor:
    """A scores table's log-probabilities with −∞ for NOTHING."""
    return logprobs.masked_fill(logprobs <= NOTHING, -torch.inf)
