"""The case that step.py's implementations share: a batch of rollouts, and turns to take.

The base policy solves almost no problem, so the parity of a hash of its tokens decides whether a
response is correct, for every implementation alike. Its span is a segment that reaches the coverage
cap, drawn by the response's id. Verdicts, annotations and routes are the pipeline's own tables.
"""

import ctypes
import math
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from loss import MIB, kib_of

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators.rows import Identity, Item, Reading, annotation_row, items
from trace_opd.pipelines.bundled.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import (
    ProblemsConfig,
    PromptConfig,
    RoutingConfig,
    SamplingConfig,
    SegmentConfig,
)
from trace_opd.schemas.labels import AnnotationStatus, DiagnosticType, VerdictStatus
from trace_opd.schemas.tables import ANNOTATIONS, ROLLOUTS, VERDICTS
from trace_opd.trace.align import ByteTable
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.routed import routed_table

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LEARNING_RATE, BETA1, BETA2 = 1e-6, 0.9, 0.99
# Computed in each step but never reached, so that gradients can be compared by their norm.
MAX_GRAD_NORM = 1e6
BATCH_TOKENS = 32_768  # of our sampler: more than a case has, so it samples one batch
WARM_UP_TOKENS = 16
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

# warm-up: a step on responses cut to a few tokens, which allocates the optimiser's states;
# training: on the case's rollouts; generation: on rollouts sampled in the step;
# teacher: no step, only TRACE's teacher on the case's rollouts.
Mode = Literal["warm-up", "training", "generation", "teacher"]


@dataclass(frozen=True)
class Case:
    """path: the model's folder. rollouts: a group of `group_size` rows per problem, in order.

    A new case has no rollouts and can only be sampled from.
    """

    path: str
    device: str
    prompt: PromptConfig
    sampling: SamplingConfig
    routing: RoutingConfig
    group_size: int
    problems: pa.Table
    rollouts: pa.Table = field(default_factory=ROLLOUTS.empty)

    def policy(self) -> Policy:
        """Fresh weights in float32; computes in bfloat16 on CUDA."""
        return load_policy(self.path, "cuda" if self.device == "cuda" else "cpu", trainable=True)

    def sample(self, policy: Policy, seed: int) -> pa.Table:
        """New rollouts of the same problems, by our sampler over transformers."""
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
        return routed_table(
            self.problems, rollouts, verdicts, annotations, table, self.routing, with_teacher
        )


def make_case(
    model: str,
    device: str,
    groups: int,
    group_size: int,
    max_new_tokens: int,
    routing: RoutingConfig,
) -> Case:
    """The problems and the rollouts that all implementations train on."""
    source, prompt = MODELS[model]
    with TemporaryDirectory() as folder:
        asked = ProblemsConfig.model_validate({"source": source, "limit": groups})
        problems = run_stage("problems", asked, Store(folder)).read()
    case = Case(
        path=resolve_policy(model),
        device=device,
        prompt=prompt,
        sampling=SamplingConfig(max_new_tokens=max_new_tokens),
        routing=routing,
        group_size=group_size,
        problems=problems,
    )
    return replace(case, rollouts=case.sample(case.policy(), seed=0))


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


class Measured(NamedTuple):
    """peak_mib: the turn's peak beyond resident_mib, the memory before it (weights, optimiser
    states, a teacher's weights). tokens: response tokens trained on. grad_norm: the step's gradient
    norm, known for a warm-up.
    """

    seconds: float
    peak_mib: float
    resident_mib: float
    tokens: int
    grad_norm: float


class Turns:
    """The measured process's side of the turns; the parent sends the next mode."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self._pipe = pipe
        self._on_cuda = device == "cuda"
        self._began = 0.0
        self._before = 0.0

    def next(self) -> Mode:
        """Wait for this process's turn."""
        return self._pipe.recv()

    def begin(self) -> None:
        if self._on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated() / MIB
        else:
            # Memory that malloc kept would hide as much of the peak.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self._before = kib_of("/proc/self/status", "VmRSS") / 1024
        self._began = time.perf_counter()

    def end(self, tokens: int, grad_norm: float = math.nan) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        if self._on_cuda:
            peak = torch.cuda.max_memory_allocated() / MIB
        else:
            peak = kib_of("/proc/self/status", "VmHWM") / 1024
        self._pipe.send(Measured(seconds, peak - self._before, self._before, tokens, grad_norm))
