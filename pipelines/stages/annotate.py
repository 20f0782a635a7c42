"""Stage annotate: key spans of correct responses and error spans of wrong ones."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import (
    AnnotateConfig,
    Annotator,
    NoAnnotator,
    OpenAIAnnotator,
    RuleAnnotator,
    SelfAnnotator,
)
from ...schemas.errors import InputError, TooManyFailed
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS, VERDICTS
from ..annotators import open_annotator
from ..annotators.batch_jobs import read_jobs
from ..annotators.openai_batch import BatchAnnotator
from ..annotators.prices import require_price
from ..annotators.prompting import load_prompt
from ..annotators.rows import NO_ANSWER, Usage
from ..annotators.rule import require_steps
from ..annotators.spending import Spending, count, dollars, open_spending, plus
from ..endpoint import read_key
from ..progress import show_fields
from ..samplers import sampling_engine
from .attempts import UNANSWERED, attempt_figures, current_attempt, first_attempt
from .base import Plan, Stage

logger = logging.getLogger(__name__)

CLAIMS = ".questions"  # in the store's root: the annotators' claims


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
    if isinstance(config.annotator, OpenAIAnnotator):
        store.local_root()  # for its journal
        semantic = current_attempt(store, semantic, inputs, config.annotator.keep_failed)
    return Plan(config, inputs, semantic, verdicts.parts, attempt_figures(semantic))


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
        require_price(annotator)
        if in_training and annotator.batch:
            raise InputError(
                "online.annotator.batch is true, and a step would wait a day for its answers; set "
                "it to false"
            )
        return identity
    if annotator.policy is not None:
        engine = sampling_engine(annotator.sampler, annotator.policy)
        return identity | {"policy": engine.identity()}
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
        self._plan, self._draft = plan, draft
        self._sampler = tokenizer = None
        rows = plan.inputs["verdicts"].rows
        if isinstance(config.annotator, SelfAnnotator) and config.annotator.policy is not None:
            engine = sampling_engine(config.annotator.sampler, config.annotator.policy)
            self._sampler, tokenizer = engine.open()
        self._asks_endpoint = isinstance(config.annotator, OpenAIAnnotator)
        folders: dict[str, Any] = {}
        if isinstance(config.annotator, OpenAIAnnotator):
            folders = _folders(config.annotator, first_attempt(plan, draft))
            self._spending = open_spending(config.annotator, folders["journal"], rows, show_fields)
        else:
            self._spending = Spending(rows=rows, tell=show_fields)
        for part in filter(draft.has_sound_part, range(plan.parts)):
            self._spending.count(*part_usage(draft.read_part(part)))
        self._annotator = open_annotator(
            config.annotator,
            config.segment,
            sampler=self._sampler,
            tokenizer=tokenizer,
            spending=self._spending,
            **folders,
        )
        self._filled = False

    def __call__(self, part: int) -> pa.Table:
        if isinstance(self._annotator, BatchAnnotator) and not self._filled:
            # A batch may take a day: all parts' questions go out together.
            self._annotator.fill(self._missing)
            self._filled = True
        table = self._annotator.annotate(*self._tables(part))
        rows, usage = part_usage(table)
        if not self._asks_endpoint:  # the one that does counts each row
            self._spending.count(rows, usage)
        logger.info(
            "part %d of %d: %d rows, %s+%s tokens, cost %s; so far %s",
            part,
            self._plan.parts,
            rows,
            count(usage.prompt_tokens),
            count(usage.completion_tokens),
            dollars(usage.cost_usd),
            "  ".join(f"{name} {value}" for name, value in self._spending.figures().items()),
        )
        return table

    def _tables(self, part: int) -> tuple[pa.Table, pa.Table, pa.Table]:
        problems, rollouts, verdicts = (
            self._plan.inputs[role].read_part(part) for role in ("problems", "rollouts", "verdicts")
        )
        return problems, rollouts, verdicts

    def _missing(self) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
        parts = range(self._plan.parts)
        return (self._tables(part) for part in parts if not self._draft.has_part(part))

    def close(self) -> None:
        self._annotator.close()
        if self._sampler is not None:
            self._sampler.close()


def _folders(annotator: OpenAIAnnotator, draft: Draft) -> dict[str, Any]:
    """Where a paid engine keeps what it must not pay for twice. draft: the first attempt.

    Raises:
        InputError: batches of this dataset are out, and the engine would ask their questions again.
    """
    batches = draft.local_path("batches")
    jobs = read_jobs(batches)
    if jobs and not annotator.batch:
        raise InputError(
            f"{draft.ref}: {len(jobs)} batches of its questions are out; run with "
            "annotator.batch=true, which waits for their answers, or cancel them "
            f"(`trace-opd batches {draft.store.root} --cancel`) and run so once for what is there"
        )
    journal = draft.local_path("journal")
    stage = journal.parent.parent

    def elsewhere() -> list[Path]:  # a dataset may be begun while this one is made
        others = draft.store.folders_beside(draft.stage, "journal")
        return [folder for folder in others if folder != journal]

    return {
        "journal": journal,
        "elsewhere": elsewhere,
        "claims": stage.parent / CLAIMS,
        "batches": batches,
    }


def part_usage(table: pa.Table) -> tuple[int, Usage]:
    """A part's rows, and its tokens, US dollars and time; None where a row's are unknown."""

    def total(name: str) -> Any:
        column = table[name]
        # One unknown makes the sum unknown, never too low.
        return None if column.null_count else pc.sum(column).as_py() or 0

    return len(table), Usage(*(total(field.name) for field in fields(Usage)))


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    status: Counter[str] = Counter()
    types: Counter[str] = Counter()
    latencies: list[float] = []
    costs: list[float | None] = []
    parts: list[dict[str, Any]] = []
    total = Usage()
    marked = judged = unanswered = 0
    for table in tables:
        rows, usage = part_usage(table)
        unanswered += table.filter(pc.starts_with(table["error"], NO_ANSWER)).num_rows
        parts.append({"rows": rows} | _tokens_and_cost(usage))
        total = plus(total, usage)
        for row in table.drop_columns(["raw_answer", "error"]).to_pylist():
            status[row["status"]] += 1
            if row["status"] == AnnotationStatus.SKIPPED:
                continue
            if row["diagnostic_type"] is not None:
                types[row["diagnostic_type"]] += 1
            judged += row["segments"][-1]["end"] if row["segments"] else 0
            marked += sum(span["end"] - span["start"] for span in row["spans"])
            latencies.append(row["latency_s"])
            costs.append(row["cost_usd"])
    known = [cost for cost in costs if cost is not None]
    summary = {
        "status": dict(status.most_common()),
        "types": dict(types.most_common()),
        "marked_share": round(marked / judged, 4) if judged else 0.0,
        **_tokens_and_cost(total),
        "cost_usd_per_row_median": median(known) if costs and len(known) == len(costs) else None,
        "latency_s_median": round(median(latencies), 4) if latencies else None,
        "per_part": parts,
    }
    if unanswered:
        summary[UNANSWERED] = unanswered
    annotator = plan.config.annotator
    if isinstance(annotator, OpenAIAnnotator) and annotator.budget_usd is not None:
        summary["budget_usd"] = annotator.budget_usd
    return summary


def _tokens_and_cost(usage: Usage) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "cost_usd")
    return {name: getattr(usage, name) for name in names}


def _check(config: AnnotateConfig, dataset: Dataset) -> None:
    """Refuse to go on with a finished dataset of which too much failed.

    Raises:
        TooManyFailed: more than `annotator.max_failed_share` of the rows that were asked about.
    """
    annotator = config.annotator
    if not isinstance(annotator, OpenAIAnnotator) or annotator.keep_failed:
        return
    status, unanswered = dataset.summary["status"], dataset.summary.get(UNANSWERED, 0)
    asked = sum(status.values()) - status.get(AnnotationStatus.SKIPPED, 0)
    failed = status.get(AnnotationStatus.FAILED, 0)
    if failed <= annotator.max_failed_share * asked:
        return
    again = f"run the same command again, which asks for {unanswered} of them again, or "
    raise TooManyFailed(
        f"{dataset.ref} is finished, but {failed} of {asked} rows failed, more than "
        f"annotator.max_failed_share={annotator.max_failed_share:g}; {again if unanswered else ''}"
        "go on with it by annotator.keep_failed=true"
    )


STAGE = Stage("annotate", AnnotateConfig, ANNOTATIONS, _resolve, _Maker, _summarize, check=_check)
