"""What each implementation that step.py measures is given: a batch of rollouts, and turns to take.

The base policy solves next to nothing, so a response is right or wrong by the parity of a hash of its
tokens, for every implementation alike. Its spans are whole segments drawn by its id: one that alone
reaches the coverage cap, or as many as fit under it. Verdicts, annotations and routes are the
pipeline's own tables.
"""

import ctypes
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from loss import MIB, kib_of

from trace_opd.pipelines.annotators.rows import Identity, Item, Reading, annotation_row, items
from trace_opd.schemas.configs import PromptConfig, RoutingConfig, SamplingConfig, SegmentConfig
from trace_opd.schemas.labels import AnnotationStatus, DiagnosticType, VerdictStatus
from trace_opd.schemas.tables import ANNOTATIONS, ROLLOUTS, VERDICTS
from trace_opd.trace.align import ByteTable
from trace_opd.trace.convert import routed_table
from trace_opd.trace.policy import Policy, load_policy

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LEARNING_RATE, BETA1, BETA2, MAX_GRAD_NORM = 1e-6, 0.9, 0.99, 1.0
WARM_UP_TOKENS = 4

# warm-up: a step on responses cut to a few tokens, so that the optimiser has its states;
# training: on the case's rollouts; generation: on rollouts sampled in the step;
# teacher: no step, only TRACE's teacher on the case's rollouts.
Mode = Literal["warm-up", "training", "generation", "teacher"]


@dataclass(frozen=True)
class Case:
    """path: the model's folder. rollouts: a group of `group_size` rows per problem, in order."""

    path: str
    device: str
    prompt: PromptConfig
    sampling: SamplingConfig
    routing: RoutingConfig
    group_size: int
    problems: pa.Table
    rollouts: pa.Table

    def policy(self) -> Policy:
        """Fresh weights in float32; computes in bfloat16 on CUDA."""
        return load_policy(self.path, "cuda" if self.device == "cuda" else "cpu", trainable=True)

    def shortened(self, table: ByteTable) -> pa.Table:
        """The rollouts, cut for a warm-up."""
        rows = self.rollouts.to_pylist()
        for row in rows:
            for name in ("token_ids", "logprobs"):
                row[name] = row[name][:WARM_UP_TOKENS]
            row["response"] = table.text(row["token_ids"])
        return ROLLOUTS.table(rows)

    def routed(self, rollouts: pa.Table, table: ByteTable, with_teacher: bool) -> pa.Table:
        """Rollouts of the case's problems, judged, annotated where there is a teacher, and routed."""
        columns = ["rollout_id", "problem_id", "group_id", "token_ids"]
        verdicts = VERDICTS.table(map(_verdict, rollouts.select(columns).to_pylist()))
        annotations = None
        if with_teacher:
            who = Identity("benchmark", "rule")
            annotations = ANNOTATIONS.table(
                annotation_row(item, who, _reading(item, self.routing.alpha))
                for item in items(self.problems, rollouts, verdicts, SegmentConfig())
            )
        return routed_table(
            self.problems, rollouts, verdicts, annotations, table, self.routing, with_teacher
        )


def reward(token_ids: Sequence[int]) -> float:
    return float(zlib.crc32(np.asarray(token_ids, dtype=np.int32).tobytes()) & 1)


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    earned = reward(row.pop("token_ids"))
    known = {"status": VerdictStatus.OK, "verifier": "hash parity", "seconds": 0.0}
    return row | known | {"reward": earned, "correct": earned > 0}


def _reading(item: Item, alpha: float) -> Reading:
    lengths = [end - start for start, end in item.segments]
    room = alpha * len(item.response)
    drawn = random.Random(item.rollout_id).sample(range(len(lengths)), len(lengths))
    marked = [i for i in drawn if lengths[i] >= room][:1]
    if not marked:
        for i in drawn:
            if lengths[i] <= room:
                marked.append(i)
                room -= lengths[i]
    if not marked:
        return Reading(AnnotationStatus.EMPTY)
    return Reading(AnnotationStatus.OK, [[i] for i in marked], DiagnosticType.ARITHMETIC)


class Measured(NamedTuple):
    """peak_mib: most memory in the turn beyond resident_mib, what was held before it (weights,
    optimiser's states, a teacher's weights). tokens: response tokens trained on."""

    seconds: float
    peak_mib: float
    resident_mib: float
    tokens: int


class Turns:
    """A measured process's side of the turns; the other side says which mode comes next."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self._pipe = pipe
        self._on_cuda = device == "cuda"
        self._began = 0.0
        self._before = 0.0

    def next(self) -> Mode:
        """Wait until it is this process's turn."""
        return self._pipe.recv()

    def begin(self) -> None:
        if self._on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated() / MIB
        else:
            # Memory that malloc keeps from before would hide as much of what follows.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
            self._before = kib_of("/proc/self/status", "VmRSS") / 1024
        self._began = time.perf_counter()

    def end(self, tokens: int) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        if self._on_cuda:
            peak = torch.cuda.max_memory_allocated() / MIB
        else:
            peak = kib_of("/proc/self/status", "VmHWM") / 1024
        self._pipe.send(Measured(seconds, peak - self._before, self._before, tokens))
