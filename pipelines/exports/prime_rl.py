"""Format prime-rl: micro-batches of its trainer's filesystem transport, as msgpack.

The trainer reads `rollouts/step_<n>/rank_0.bin` of its output folder: a list of its MicroBatch, an
array of fields in a fixed order. Source: PrimeIntellect-ai/prime-rl,
src/prime_rl/transports/rollouts/types.py and filesystem.py, version 0.8.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ...schemas.configs.train import TrainConfig
from ...schemas.errors import InputError
from ...schemas.extras import require
from ...schemas.labels import Route
from ...schemas.tables import SCORES
from .format import File, Format, Options
from .source import RoutedSource

# The fields of MicroBatch in their order. Those after the first nine have the default null.
FIELDS = (
    "input_ids", "loss_mask", "advantages", "inference_logprobs", "position_ids",
    "sequence_lengths", "temperatures", "env_names", "seq_lens", "ref_logprobs", "routed_experts",
    "mm_kwargs", "mm_token_type_ids", "rl_weights", "ce_weights", "ref_kl_weights",
)  # fmt: skip
_ENVIRONMENT = "trace_opd"


def _files(source: RoutedSource, options: Options) -> Iterator[File]:
    require("msgspec")
    import msgspec

    encoder, step = msgspec.msgpack.Encoder(), 0
    most = options.groups_per_step
    if most is None:
        most = TrainConfig.model_fields["groups_per_step"].default
    waiting: list[list[dict[str, Any]]] = []

    def file(groups: list[list[dict[str, Any]]]) -> File:
        batches = [micro_batch(row) for group in groups for row in group]
        fields = [[batch[name] for name in FIELDS] for batch in batches]
        return File(f"rollouts/step_{step}/rank_0.bin", encoder.encode(fields), len(batches))

    for group in _groups(source, options):
        waiting.append(group)
        if len(waiting) == most:
            yield file(waiting)
            waiting, step = [], step + 1
    if waiting:
        yield file(waiting)


def _groups(source: RoutedSource, options: Options) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group, with the teacher's log-probabilities where there are scores."""
    scores = None
    if options.scores is not None:
        scores = source.store.get(options.scores, SCORES)
        routed = scores.manifest["inputs"].get("routed")
        if routed != source.dataset.ref:
            raise InputError(
                f"dataset {scores.ref}: scores {routed}, and the export is of "
                f"{source.dataset.ref}; score the dataset that you export"
            )
    for part in source.parts(with_texts=False):
        scored: dict[str, dict[str, Any]] = {}
        if scores is not None:
            names = ["rollout_id", "positions", "logprobs"]
            table: pa.Table = scores.read_part(part.index, names)
            scored = {row["rollout_id"]: row for row in table.to_pylist()}
        groups: dict[str, list[dict[str, Any]]] = {}  # its rows need not be adjacent
        for row in part.table.to_pylist():
            row["scores"] = scored.get(row["rollout_id"])
            groups.setdefault(row["group_id"], []).append(row)
        yield from groups.values()


def micro_batch(row: dict[str, Any]) -> dict[str, Any]:
    """A routed row as a MicroBatch of one sequence, unpacked.

    A token of route rkl leaves the component rl for ref_kl if its teacher's log-probability is
    known; every other token is rl's.
    """
    before, tokens = len(row["prompt_token_ids"]), len(row["token_ids"])
    total = before + tokens
    rl, teacher = [1.0] * total, [0.0] * total
    known = row["scores"]
    if known is not None:
        for at, logprob in zip(known["positions"], known["logprobs"], strict=True):
            if row["route"][at] == int(Route.RKL):
                rl[before + at], teacher[before + at] = 0.0, logprob
    distilled = [1.0 - weight for weight in rl]
    with_teacher = any(distilled)
    return {
        "input_ids": row["prompt_token_ids"] + row["token_ids"],
        "loss_mask": [False] * before + (row.get("policy_mask") or [True] * tokens),
        "advantages": [0.0] * before + [row["advantage"]] * tokens,
        "inference_logprobs": [0.0] * before + row["logprobs"],
        "position_ids": list(range(total)),
        "sequence_lengths": [total],
        "temperatures": [row["temperature"] or 1.0] * total,
        "env_names": [_ENVIRONMENT] * total,
        "seq_lens": [total],
        "ref_logprobs": teacher if with_teacher else None,
        "routed_experts": None,
        "mm_kwargs": None,
        "mm_token_type_ids": None,
        "rl_weights": rl if with_teacher else None,
        "ce_weights": None,
        "ref_kl_weights": distilled if with_teacher else None,
    }


FORMAT = Format(
    summary="rollouts/step_<n>/rank_0.bin: micro-batches of one sequence each, for a trainer with "
    "the filesystem transport and one data rank; copy rollouts/ into its output folder.",
    version="prime-rl 0.8",
    keeps="token ids, log-probabilities of the sampler, temperatures, advantages; with --scores "
    "the teacher's log-probability of tokens of route rkl, as component ref_kl with weight 1.",
    loses="forward KL and JSD: prime-rl has neither, and their tokens are GRPO's. Reverse KL is "
    "its policy-gradient estimate on the sampled token, not the sum over the vocabulary. λ's "
    "schedule, rewards, type labels, problems.",
    files=_files,
    reads=("scores", "groups_per_step"),
)
