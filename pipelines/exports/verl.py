"""Format verl: problems for RLHFDataset, and correct responses for MultiTurnSFTDataset."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ...data.parts import encoded
from .format import File, Format, Options
from .source import Part, RoutedSource, asked_problems
from .trl import MESSAGES

_RL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("split", pa.string()),
                    ("problem_id", pa.string()),
                    ("answer_kind", pa.string()),
                ]
            ),
        ),
    ]
)
_SFT = pa.schema([("messages", MESSAGES), ("rollout_id", pa.string())])


def _files(source: RoutedSource, options: Options) -> Iterator[File]:
    count = 0
    for part in source.parts():
        problems = asked_problems(part)
        rows = [_rl_row(source, problem, count + at) for at, problem in enumerate(problems)]
        count += len(rows)
        name = f"part-{part.index:05d}.parquet"
        yield File(f"rl/{name}", encoded(pa.Table.from_pylist(rows, schema=_RL)), len(rows))
        answered = _answered(source, part)
        if answered:
            table = pa.Table.from_pylist(answered, schema=_SFT)
            yield File(f"sft/{name}", encoded(table), len(answered))


def _rl_row(source: RoutedSource, problem: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        "data_source": problem["source"],
        "prompt": source.student(problem),
        "ability": problem["answer_kind"],
        "reward_model": {"style": "rule", "ground_truth": problem["answer"]},
        "extra_info": {
            "index": index,
            "split": problem["split"],
            "problem_id": problem["problem_id"],
            "answer_kind": problem["answer_kind"],
        },
    }


def _answered(source: RoutedSource, part: Part) -> list[dict[str, Any]]:
    """The correct responses that ended, as conversations."""
    columns = part.table.select(["problem", "rollout_id", "correct", "truncated"]).to_pylist()
    return [
        {
            "messages": [
                *source.student(row),
                {"role": "assistant", "content": part.responses[row["rollout_id"]]},
            ],
            "rollout_id": row["rollout_id"],
        }
        for row in columns
        if row["correct"] and not row["truncated"]
    ]


FORMAT = Format(
    summary="rl/: the problems for GRPO and on-policy distillation (RLHFDataset). sft/: correct "
    "responses as conversations (MultiTurnSFTDataset).",
    version="verl 0.9",
    keeps="rl/: prompts, gold answers, split and problem ids. sft/: texts of correct responses.",
    loses="routes, type labels and the teacher's prompt (verl's teacher reads the student's), "
    "advantages, log-probabilities, the sampler's token ids (verl tokenises the text again), wrong "
    "responses. `data_source` is a source of ours, so name a reward with custom_reward_function.",
    files=_files,
)
