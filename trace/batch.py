"""Routed tables to training sequences, sequences to padded micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from ..schemas.configs import PromptConfig
from ..schemas.errors import InputError
from ..schemas.labels import DiagnosticType, Route
from .prompt import render_chat, teacher_messages


@dataclass(frozen=True)
class TrainingSequence:
    """One routed response. Arrays are (response tokens,); prompts are token ids."""

    rollout_id: str
    group_id: str
    prompt_ids: list[int]
    token_ids: np.ndarray
    logprobs: np.ndarray
    route: np.ndarray
    advantage: float
    reward: float
    temperature: float
    truncated: bool
    teacher_prompt_ids: list[int] | None

    @property
    def routed_end(self) -> int:
        """One past the last routed token: as far as the teacher has to read."""
        (positions,) = np.nonzero(self.route)
        return int(positions[-1]) + 1 if len(positions) else 0


def training_sequences(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    with_teacher: bool = True,
) -> list[TrainingSequence]:
    """Rows of a routed table as sequences; rows with routed tokens get the teacher's prompt.

    The type label is the only annotation that goes into that prompt. Without a teacher (λ is 0)
    no prompt is made.
    """
    sequences = []
    for row in table.to_pylist():
        route = np.array(row["route"], dtype=np.uint8)
        teacher_prompt_ids = None
        if with_teacher and route.any():
            label = DiagnosticType(row["diagnostic_type"])
            messages = teacher_messages(prompt, row["problem"], label)
            teacher_prompt_ids = render_chat(tokenizer, messages, prompt.thinking)
        sequences.append(
            TrainingSequence(
                rollout_id=row["rollout_id"],
                group_id=row["group_id"],
                prompt_ids=row["prompt_token_ids"],
                token_ids=np.array(row["token_ids"], dtype=np.int64),
                logprobs=np.array(row["logprobs"], dtype=np.float32),
                route=route,
                advantage=row["advantage"],
                reward=row["reward"],
                temperature=row["temperature"],
                truncated=row["truncated"],
                teacher_prompt_ids=teacher_prompt_ids,
            )
        )
    return sequences


def micro_batches(
    sequences: Sequence[TrainingSequence], max_tokens: int
) -> list[list[TrainingSequence]]:
    """Cut sequences, longest first, so that rows × longest row stays within `max_tokens`."""
    by_length = sorted(
        sequences, key=lambda s: (-(len(s.prompt_ids) + len(s.token_ids)), s.rollout_id)
    )
    batches: list[list[TrainingSequence]] = []
    for sequence in by_length:
        if batches:
            longest = len(batches[-1][0].prompt_ids) + len(batches[-1][0].token_ids)
            if (len(batches[-1]) + 1) * longest <= max_tokens:
                batches[-1].append(sequence)
                continue
        batches.append([sequence])
    return batches


def response_logits(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[np.ndarray],
    keep: Sequence[np.ndarray],
) -> torch.Tensor:
    """Logits that predict chosen response tokens: (sum of kept, vocab).

    keep: per row the response positions wanted, ascending. Only those positions go through the
    language-model head. Rows are padded on the right, which causal attention never sees.
    """
    device = next(model.parameters()).device
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    # The logits at position i predict the token at i + 1.
    row_index = np.concatenate([np.full(len(k), i) for i, k in enumerate(keep)])
    position = np.concatenate([len(p) + k - 1 for p, k in zip(prompts, keep, strict=True)])
    hidden = model.base_model(  # pyright: ignore[reportCallIssue]
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
    ).last_hidden_state  # (rows, length, hidden)
    chosen = hidden[torch.from_numpy(row_index).to(device), torch.from_numpy(position).to(device)]
    logits = model.get_output_embeddings()(chosen)  # pyright: ignore[reportCallIssue]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises InputError if `response_logits` misses something that the model does to its logits.

    Some architectures scale them behind the head; training on other logits than the sampler's
    would be silent.
    """
    ids = np.arange(4)
    ours = response_logits(model, [ids[:1].tolist()], [ids[1:]], [np.arange(3)])
    theirs = model(input_ids=torch.from_numpy(ids)[None].to(model.device)).logits[0, :3]
    if not torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02):
        raise InputError(
            f"policy {model.config.model_type}: this architecture changes its logits behind the "
            "head in a way that the trainer does not know; use another policy"
        )


def routed_positions(sequence: TrainingSequence) -> np.ndarray:
    """Response positions whose route is not GRPO, ascending."""
    return np.flatnonzero(sequence.route != int(Route.GRPO))
