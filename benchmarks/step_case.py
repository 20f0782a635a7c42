"""The case that step.py's implementations share: a batch of rollouts of one model, and turns.

Rollouts are sampled by a bundled model, or random ids of given lengths for a shape with random
weights. The parity of a hash of its tokens decides whether a response is correct, for every
implementation alike: the bundled model solves almost no problem, a random one none. A span is a
segment that reaches the coverage cap, drawn by the response's id. Verdicts, annotations and routes
are the pipeline's own tables.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from shapes import random_model, shape_of

from trace_opd.pipelines.annotators.rows import Identity, Item, Reading, annotation_row, items
from trace_opd.pipelines.bundled.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.schemas.configs import (
    ProblemsConfig,
    PromptConfig,
    RoutingConfig,
    SamplingConfig,
    SegmentConfig,
)
from trace_opd.schemas.labels import (
    AnnotationStatus,
    AnswerKind,
    DiagnosticType,
    FinishReason,
    VerdictStatus,
)
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import Policy, load_policy, load_tokenizer, policy_info
from trace_opd.trace.protocols import Completion, PolicyInfo, Prompt
from trace_opd.trace.routed import routed_table

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LEARNING_RATE, BETA1, BETA2 = 1e-6, 0.9, 0.99
# Computed in each step but never reached, so that gradients can be compared by their norm.
MAX_GRAD_NORM = 1e6
BATCH_TOKENS = 32_768  # of our sampler: more than a case has, so it samples one batch
WARM_UP_TOKENS = 16
# Of random responses: ids below are micro's special tokens.
FIRST_ORDINARY_ID, LINE_TOKENS = 4, 8
# With at most three segments, one of them is at least a third of the response: above any lower cap.
SEGMENTS = SegmentConfig(max_segments=3)
# Problems for each model, and a prompt with responses of different lengths.
MODELS: dict[str, tuple[dict[str, Any], PromptConfig]] = {
    "smollm2": (
        {"kind": "word-problems", "steps": 2},
        PromptConfig(student="{problem} Answer in two or three sentences."),
    ),
    "micro": (
        {"kind": "arithmetic"},
        PromptConfig(student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE),
    ),
}


@dataclass(frozen=True)
class Case:
    """path: the model's folder. rollouts: a group of `group_size` rows per problem, in order.

    A new case has no rollouts and can only be sampled from. lengths: a name of the rollouts'
    lengths in results.
    """

    path: str
    lengths: str
    device: str
    prompt: PromptConfig
    sampling: SamplingConfig
    routing: RoutingConfig
    group_size: int
    problems: pa.Table
    rollouts: pa.Table = field(default_factory=ROLLOUTS.empty)

    def sample(self, policy: Policy, seed: int) -> pa.Table:
        """New rollouts of the same problems, by our sampler over transformers."""
        from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler

        sampler = TransformersPolicySampler(policy, BATCH_TOKENS)
        return rollouts_table(
            self.problems,
            sampler,
            policy.tokenizer,
            self.prompt,
            self.sampling,
            self.group_size,
            seed,
        )

    def shortened(self, table: ByteTable) -> pa.Table:
        """The rollouts, cut for a warm-up."""
        rows = self.rollouts.to_pylist()
        for row in rows:
            for name in ("token_ids", "logprobs"):
                row[name] = row[name][:WARM_UP_TOKENS]
            row["response"] = table.text(row["token_ids"])
        return ROLLOUTS.table(rows)

    def routed(self, rollouts: pa.Table, table: ByteTable, with_teacher: bool) -> pa.Table:
        """The rollouts, verified, routed, and annotated if there is a teacher."""
        columns = ["rollout_id", "problem_id", "group_id", "token_ids"]
        verdicts = VERDICTS.table(map(_verdict, rollouts.select(columns).to_pylist()))
        annotations = None
        if with_teacher:
            who = Identity("benchmark", "rule")
            annotations = ANNOTATIONS.table(
                annotation_row(item, who, _reading(item, self.routing.alpha))
                for item in items(self.problems, rollouts, verdicts, SEGMENTS)
            )
        routed = routed_table(
            self.problems, rollouts, verdicts, annotations, table, self.routing, with_teacher
        )
        if self.group_size > 1:
            return routed
        # A group of one has no advantages.
        index = routed.schema.get_field_index("advantage")
        ones = pa.array(np.ones(len(routed), np.float32))
        return routed.set_column(index, routed.schema.field(index), ones)


def unsampled_case(
    shape: str,
    device: str,
    groups: int,
    group_size: int,
    max_new_tokens: int,
    routing: RoutingConfig,
    folder: str,
) -> Case:
    """Problems to sample from, by a bundled model or by one with random weights.

    folder: where the random model is, or will be written.
    """
    if shape in MODELS:
        from trace_opd.data.store import Store
        from trace_opd.pipelines.models import resolve_policy
        from trace_opd.pipelines.pipeline import run_stage

        source, prompt = MODELS[shape]
        asked = ProblemsConfig.model_validate({"source": source, "limit": groups})
        with TemporaryDirectory() as store:
            problems = run_stage("problems", asked, Store(store)).read()
        path = resolve_policy(shape)
    else:
        path = random_model(shape_of(shape), folder)
        problems, (_, prompt) = _sums(groups), MODELS["micro"]
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    return Case(path, "sampled", device, prompt, sampling, routing, group_size, problems)


def sampled_case(case: Case) -> Case:
    """The case with rollouts by its own model."""
    return replace(case, rollouts=case.sample(load_policy(case.path), seed=0))


def reward(token_ids: Sequence[int]) -> float:
    return float(zlib.crc32(np.asarray(token_ids, dtype=np.int32).tobytes()) & 1)


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    earned = reward(row.pop("token_ids"))
    known = {"status": VerdictStatus.OK, "verifier": "hash parity", "seconds": 0.0}
    return row | known | {"reward": earned, "correct": earned > 0}


def _reading(item: Item, alpha: float) -> Reading:
    lengths = [end - start for start, end in item.segments]
    long = [i for i, length in enumerate(lengths) if length >= alpha * len(item.response)]
    if not long:
        return Reading(AnnotationStatus.EMPTY)
    marked = random.Random(item.rollout_id).choice(long)
    return Reading(AnnotationStatus.OK, [[marked]], DiagnosticType.ARITHMETIC)


@dataclass(frozen=True)
class _RandomSampler:
    """A `Sampler` of random ids."""

    policy: PolicyInfo
    table: ByteTable
    length: int

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        # Every other response is correct, so that no group is without signal.
        return [
            [self._response(prompt, seed, float(index % 2)) for index, seed in enumerate(own)]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _response(self, prompt: Prompt, seed: int, wanted: float) -> Completion:
        rng = np.random.default_rng(seed)
        vocab = len(self.table.pieces)
        ids = rng.integers(FIRST_ORDINARY_ID, vocab, self.length)
        # Segments end with lines.
        ids[LINE_TOKENS - 1 :: LINE_TOKENS] = self.table.pieces.index(b"\n")
        for part in (ids[:WARM_UP_TOKENS], ids):
            while reward(part) != wanted:
                part[-2] = rng.integers(FIRST_ORDINARY_ID, vocab)
        return Completion(
            self.table.text(ids),
            FinishReason.LENGTH,
            ids.tolist(),
            [-math.log(vocab)] * self.length,
            prompt.token_ids,
        )


def random_case(
    path: str, device: str, lengths: tuple[int, int], group_size: int, routing: RoutingConfig
) -> Case:
    """Random rollouts of a model folder; lengths: responses, and tokens of each."""
    responses, length = lengths
    tokenizer = load_tokenizer(path)
    _, prompt = MODELS["micro"]
    problems = _sums(responses // group_size)
    sampling = SamplingConfig(max_new_tokens=length)
    case = Case(
        path, f"{responses}x{length}", device, prompt, sampling, routing, group_size, problems
    )
    sampler = _RandomSampler(policy_info(path, tokenizer), byte_table(tokenizer), length)
    rollouts = rollouts_table(problems, sampler, tokenizer, prompt, sampling, group_size, 0)
    return replace(case, rollouts=rollouts)


def _sums(count: int) -> pa.Table:
    return PROBLEMS.table(
        {
            "problem_id": str(index),
            "problem": f"{index} + {index} =",
            "answer": str(2 * index),
            "answer_kind": AnswerKind.MATH,
            "source": "benchmark",
            "split": "train",
        }
        for index in range(count)
    )


def padded_rows(case: Case, micro_batch_tokens: int) -> int:
    """Sequences per micro-batch of a trainer that pads, so that all have equally many."""
    prompts, responses = (
        max(map(len, case.rollouts[name].to_pylist())) for name in ("prompt_token_ids", "token_ids")
    )
    most = max(1, micro_batch_tokens // (prompts + responses))
    count = len(case.rollouts)
    return next(rows for rows in range(min(most, count), 0, -1) if count % rows == 0)


def description(case: Case) -> str:
    """A sentence about the batch."""
    lengths = np.array([len(ids) for ids in case.rollouts["token_ids"].to_pylist()])
    prompts = [len(ids) for ids in case.rollouts["prompt_token_ids"].to_pylist()]
    routed = case.routed(case.rollouts, byte_table(load_tokenizer(case.path)), True)
    routes = [np.count_nonzero(route) for route in routed["route"].to_pylist()]
    return (
        f"{len(case.problems)} groups of {case.group_size} responses, {lengths.min()} to "
        f"{lengths.max()} tokens, {lengths.mean():.0f} in the mean, behind prompts of "
        f"{min(prompts)} to {max(prompts)}; {np.count_nonzero(routes) / len(routes):.0%} of the "
        f"responses have routed tokens, which are {sum(routes) / lengths.sum():.0%} of all"
    )
