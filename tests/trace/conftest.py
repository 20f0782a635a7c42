"""Fixtures of the method's tests: a group of responses small enough to route by hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa
import pytest

from trace_opd.pipelines.annotators.rows import Identity, Reading, annotation_row, items
from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import RoutingConfig, SegmentConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.labels import AnnotationStatus, DiagnosticType
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.routed import routed_table

LIMIT = 20


@dataclass(frozen=True)
class Sample:
    """One response in micro's vocabulary: one token per character and one for its end.

    marked: segment indices of each span. label: its diagnostic type; None: nothing is marked.
    """

    text: str
    correct: bool | None
    label: DiagnosticType | None = None
    marked: tuple[list[int], ...] = ()
    truncated: bool = False
    group: str = "g"


@dataclass(frozen=True)
class Example:
    """The four tables of some samples; each group has its own problem."""

    problems: pa.Table
    rollouts: pa.Table
    verdicts: pa.Table
    annotations: pa.Table
    bytes: ByteTable

    def routed(self, config: RoutingConfig, with_teacher: bool = True) -> list[dict]:
        tables = (self.problems, self.rollouts, self.verdicts, self.annotations)
        routed = routed_table(*tables, self.bytes, config, with_teacher)
        return validate(routed, ROUTED).to_pylist()

    def with_problems(self, **columns: str | None) -> "Example":
        rows = [row | columns for row in self.problems.to_pylist()]
        return replace(self, problems=PROBLEMS.table(rows))


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    """Makes the tables of samples, which are given as dictionaries; rollout ids are r0, r1, …"""
    tokenizer = load_tokenizer(resolve_policy("micro"))
    pieces = byte_table(tokenizer)

    def make(*given: dict) -> Example:
        samples = [Sample(**one) for one in given]
        problems = PROBLEMS.table(
            {
                "problem_id": f"p-{group}",
                "problem": f"problem {group}",
                "answer": f"answer {group}",
                "answer_kind": "math",
                "solution": f"solution {group}",
                "source": "test",
                "split": "train",
            }
            for group in dict.fromkeys(sample.group for sample in samples)
        )
        rollouts, verdicts = [], []
        for index, sample in enumerate(samples):
            ids = {
                "rollout_id": f"r{index}",
                "problem_id": f"p-{sample.group}",
                "group_id": sample.group,
            }
            token_ids = tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            if not sample.truncated:
                token_ids = [*token_ids, tokenizer.eos_token_id]
            rollouts.append(
                ids
                | {
                    "sample_index": index,
                    "prompt_token_ids": [1],
                    "token_ids": token_ids,
                    "logprobs": [-0.5] * len(token_ids),
                    "response": sample.text,
                    "finish_reason": "length" if sample.truncated else "stop",
                    "policy_name": "micro",
                    "policy_revision": "r",
                    "policy_step": 0,
                    "vocab_fingerprint": "v",
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": 0,
                    "max_new_tokens": LIMIT,
                    "seed": index,
                    "on_policy": True,
                }
            )
            verdicts.append(
                ids
                | {
                    "reward": None if sample.correct is None else float(sample.correct),
                    "correct": sample.correct,
                    "status": "ok",
                    "verifier": "by hand",
                    "seconds": 0.0,
                }
            )
        tables = (problems, ROLLOUTS.table(rollouts), VERDICTS.table(verdicts))
        annotations = ANNOTATIONS.table(
            annotation_row(item, Identity("hand", "hand"), _reading(sample))
            for item, sample in zip(items(*tables, SegmentConfig()), samples, strict=True)
        )
        return Example(*tables, annotations, pieces)

    return make


def _reading(sample: Sample) -> Reading:
    if sample.label is None:
        return Reading(AnnotationStatus.EMPTY)
    return Reading(AnnotationStatus.OK, list(sample.marked), sample.label)
