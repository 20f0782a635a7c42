"""Format trl: problems for GRPOTrainer, and key spans for SFTTrainer, as Parquet."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.parts import encoded
from .format import File, Format, Options
from .source import Part, RoutedSource, asked_problems

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IGNORED = -100  # label of a token without loss
_TOKENS = pa.list_(pa.int64())
_SFT = pa.schema(
    [
        ("input_ids", _TOKENS),
        ("labels", _TOKENS),
        ("rollout_id", pa.string()),
        ("diagnostic_type", pa.string()),
    ]
)


def _files(source: RoutedSource, options: Options) -> Iterator[File]:
    for part in source.parts():
        prompts = _prompts(source, part)
        name = f"train-{part.index:05d}.parquet"
        yield File(f"grpo/{name}", encoded(prompts), len(prompts))
        spans = key_spans(part)
        if len(spans):
            yield File(f"sft/{name}", encoded(spans), len(spans))


def _prompts(source: RoutedSource, part: Part) -> pa.Table:
    """A row a problem: its columns, and `prompt`, the student's conversation."""
    rows = asked_problems(part)
    problems = source.dataset.input("problems").read_part(part.index)
    table = pa.Table.from_pylist(rows, schema=problems.schema.remove_metadata())
    messages = [source.student(row) for row in rows]
    return table.append_column("prompt", pa.array(messages, MESSAGES))


def key_spans(part: Part) -> pa.Table:
    """A row a correct response with routed tokens, which alone have labels."""
    rows: list[dict[str, Any]] = []
    for row in part.table.to_pylist():
        if not row["correct"] or not any(row["route"]):
            continue
        ids = np.asarray(row["token_ids"])
        labels = np.where(np.asarray(row["route"]) > 0, ids, _IGNORED)
        prompt = row["prompt_token_ids"]
        rows.append(
            {
                "input_ids": [*prompt, *ids.tolist()],
                "labels": [_IGNORED] * len(prompt) + labels.tolist(),
                "rollout_id": row["rollout_id"],
                "diagnostic_type": row["diagnostic_type"],
            }
        )
    return pa.Table.from_pylist(rows, schema=_SFT)


FORMAT = Format(
    summary="grpo/: the problems, with `prompt`, for GRPOTrainer and RoutedGRPOTrainer. sft/: "
    "correct responses, tokenised, for SFTTrainer; the labels are the routed tokens alone.",
    version="TRL 1.16",
    keeps="grpo/: problems, prompts and every column that a reward function may read. sft/: the "
    "sampler's token ids, and which of them are routed in correct responses.",
    loses="grpo/: responses and routes; the trainer samples its own. sft/: wrong responses, "
    "rewards and advantages, GRPO's term, log-probabilities, the teacher: routed tokens are "
    "learned as labels.",
    files=_files,
)
