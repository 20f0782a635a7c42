"""Our tables of TRL's batches: problems, rollouts and verdicts of generated completions.

trl.py makes a `Batch` within TRL's reward call; `trl_dataset` makes the dataset that it trains on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..data.store import content_hash
from ..schemas.configs import PromptConfig
from ..schemas.contract import validate
from ..schemas.errors import InputError
from ..schemas.labels import FinishReason
from ..schemas.tables import PROBLEMS, ROLLOUTS
from ..trace.align import ByteTable
from ..trace.prompt import student_messages

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_REQUIRED = ("problem_id", "problem", "answer", "answer_kind", "source", "split")


def trl_dataset(problems: pa.Table, prompt: PromptConfig | None = None) -> Dataset:
    """Problems as a TRL dataset: their columns, and `prompt`, the student's conversation.

    problems: a problems table (`store.get("problems").read()`); prompt: that of the settings.
    """
    config = prompt or PromptConfig()
    read = [name for name in ("problem", "history") if name in problems.column_names]
    messages = [
        student_messages(config, row["problem"], row.get("history"))
        for row in problems.select(read).to_pylist()
    ]
    table: Any = problems.append_column("prompt", pa.array(messages, _MESSAGES))
    return Dataset(table.replace_schema_metadata(None))


@dataclass(frozen=True)
class Generation:
    """How a batch was generated. logprobs: a list a completion, or None."""

    step: int
    group_size: int
    prompt_ids: Sequence[list[int]]
    logprobs: Sequence[list[float]] | None
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    policy_name: str
    vocabulary: str


@dataclass(frozen=True)
class Batch:
    """A generation batch as tables, rows in TRL's order."""

    problems: pa.Table
    rollouts: pa.Table
    verdicts: pa.Table


def problems_of(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """The distinct problems among a batch's dataset columns.

    Raises:
        InputError: a column is missing, or a row breaks the contract of problems.
    """
    for name in _REQUIRED:
        if name not in columns:
            raise InputError(
                f"train_dataset: has no column {name}; make it of a problems table with "
                "`trl_dataset`"
            )
    names = [field.name for field in PROBLEMS.schema if field.name in columns]
    distinct: dict[str, dict[str, Any]] = {}
    for values in zip(*(columns[name] for name in names), strict=True):
        row = dict(zip(names, values, strict=True))
        distinct.setdefault(row["problem_id"], row)
    return validate(PROBLEMS.table(distinct.values()), PROBLEMS, "train_dataset")


def rollouts_of(
    problem_ids: Sequence[str],
    completions: Sequence[list[int]],
    made: Generation,
    ends: Sequence[int],
    pieces: ByteTable,
) -> pa.Table:
    """Completions as a rollouts table; TRL puts a prompt's completions one after another.

    Without the sampler's log-probabilities theirs are 0: no routing rule of the trainer reads them.
    """
    size, rows = made.group_size, []
    for index, (problem_id, ids) in enumerate(zip(problem_ids, completions, strict=True)):
        stopped = bool(ids) and ids[-1] in ends
        known = made.logprobs[index] if made.logprobs is not None else [0.0] * len(ids)
        rows.append(
            {
                "rollout_id": content_hash([problem_id, made.step, index, ids]),
                "problem_id": problem_id,
                "group_id": content_hash([problem_id, made.step, index // size]),
                "sample_index": index % size,
                "prompt_token_ids": made.prompt_ids[index],
                "token_ids": ids,
                "logprobs": known,
                "response": pieces.text(ids),
                "finish_reason": FinishReason.STOP if stopped else FinishReason.LENGTH,
                "policy_name": made.policy_name,
                "policy_revision": "",
                "policy_step": made.step,
                "vocab_fingerprint": made.vocabulary,
                "temperature": made.temperature,
                "top_p": made.top_p,
                "top_k": made.top_k,
                "max_new_tokens": made.max_new_tokens,
                "seed": 0,
                "on_policy": True,
            }
        )
    return ROLLOUTS.table(rows)
