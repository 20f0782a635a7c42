"""Stage annotate: key spans of correct responses and error spans of wrong ones."""

from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import Any

import pyarrow as pa

from ..data.store import Dataset, Draft, Store
from ..schemas.configs import (
    AnnotateConfig,
    Annotator,
    NoAnnotator,
    OpenAIAnnotator,
    RuleAnnotator,
    SelfAnnotator,
)
from ..schemas.errors import InputError
from ..schemas.labels import AnnotationStatus
from ..schemas.tables import ANNOTATIONS, VERDICTS
from .annotators import open_annotator
from .annotators.prompting import load_prompt
from .annotators.rule import require_steps
from .endpoint import read_key
from .rollout import policy_identity
from .samplers import open_sampler
from .stage import Plan, Stage


def _resolve(config: AnnotateConfig, store: Store) -> Plan:
    verdicts = store.get(config.verdicts, VERDICTS)
    rollouts = verdicts.input("rollouts")
    inputs = {
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    semantic = config.semantic()
    del semantic["verdicts"]  # the dataset's id stands for it
    semantic["annotator"] |= annotator_identity(config.annotator, inputs["problems"])
    return Plan(config, inputs, semantic, verdicts.parts)


def annotator_identity(
    annotator: Annotator, problems: Dataset, in_training: bool = False
) -> dict[str, Any]:
    """What a dataset id hashes in place of paths: the content of prompt files and weights.

    in_training: the routing looks at annotations, and a policy left out stands for the current
    weights.

    Raises:
        InputError: problems without steps for a rule, a missing key, a bad prompt or schema file,
            no policy, a policy without a chat template, nobody asked in training.
    """
    if isinstance(annotator, NoAnnotator):
        if in_training:
            raise InputError(
                "online.annotator.engine is none, and online.routing looks at annotations; name an "
                "engine that makes them, or another routing.rule and teacher_context"
            )
        return {}
    if isinstance(annotator, RuleAnnotator):
        for part in range(problems.parts):
            require_steps(problems.read_part(part, ["steps"]), f"{problems.ref}, part {part}")
        return {}
    identity: dict[str, Any] = dict(load_prompt(annotator.prompt, annotator.answer_schema).sha256)
    if isinstance(annotator, OpenAIAnnotator):
        read_key(annotator.api_key_env, "annotator.api_key_env")
        return identity
    if annotator.policy is not None:
        return identity | {"policy": policy_identity(annotator.sampler, annotator.policy)}
    if not in_training:
        raise InputError(
            "annotator.policy is not set; name the policy that annotates (only in training it may "
            "be left out, for the current weights)"
        )
    return identity


class _Maker:
    """Annotates one part at a time with one open engine."""

    def __init__(self, plan: Plan, draft: Draft) -> None:
        config: AnnotateConfig = plan.config
        self._inputs = plan.inputs
        self._sampler = tokenizer = journal = None
        if isinstance(config.annotator, SelfAnnotator) and config.annotator.policy is not None:
            self._sampler, tokenizer = open_sampler(
                config.annotator.sampler, config.annotator.policy
            )
        if isinstance(config.annotator, OpenAIAnnotator):
            journal = draft.local_path("journal")
        self._annotator = open_annotator(
            config.annotator,
            config.segment,
            journal=journal,
            sampler=self._sampler,
            tokenizer=tokenizer,
        )

    def __call__(self, part: int) -> pa.Table:
        problems, rollouts, verdicts = (
            self._inputs[role].read_part(part) for role in ("problems", "rollouts", "verdicts")
        )
        return self._annotator.annotate(problems, rollouts, verdicts)

    def close(self) -> None:
        self._annotator.close()
        if self._sampler is not None:
            self._sampler.close()


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    status: Counter[str] = Counter()
    types: Counter[str] = Counter()
    totals: dict[str, float | None] = {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
    latencies: list[float] = []
    marked = judged = 0
    for table in tables:
        for row in table.drop_columns(["raw_answer", "error"]).to_pylist():
            status[row["status"]] += 1
            if row["status"] == AnnotationStatus.SKIPPED:
                continue
            if row["diagnostic_type"] is not None:
                types[row["diagnostic_type"]] += 1
            judged += row["segments"][-1]["end"] if row["segments"] else 0
            marked += sum(span["end"] - span["start"] for span in row["spans"])
            latencies.append(row["latency_s"])
            for name, total in totals.items():
                # One unknown makes the sum unknown, never too low.
                known = total is not None and row[name] is not None
                totals[name] = total + row[name] if known else None  # type: ignore[operator]
    return {
        "status": dict(status.most_common()),
        "types": dict(types.most_common()),
        "marked_share": round(marked / judged, 4) if judged else 0.0,
        **totals,
        "latency_s_median": round(median(latencies), 4) if latencies else None,
    }


ANNOTATE_STAGE = Stage("annotate", AnnotateConfig, ANNOTATIONS, _resolve, _Maker, _summarize)
