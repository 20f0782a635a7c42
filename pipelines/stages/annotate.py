"""Stage annotate: key spans of correct responses and error spans of wrong ones.

Called by the registry of stages. Engines are in annotators/; here are the stage's inputs, its
attempts and its money.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import AnnotateConfig
from ...schemas.errors import InputError, TooManyFailed
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS, VERDICTS
from ..annotators import engine_of, open_annotator
from ..annotators.attempts import UNANSWERED, attempt_figures, current_attempt, first_attempt
from ..annotators.batch_jobs import read_jobs
from ..annotators.summary import bearing, part_usage, summarize
from ..paid.bill import read_bill
from ..paid.keeping import CLAIMS, JOURNAL
from ..paid.prices import find_price
from ..paid.spending import Spending, count, dollars, open_spending
from ..progress import show_fields
from .base import Plan, Stage

logger = logging.getLogger(__name__)


def _resolve(config: AnnotateConfig, store: Store) -> Plan:
    verdicts = store.get(config.verdicts, VERDICTS)
    rollouts = verdicts.input("rollouts")
    inputs = {
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    engine = engine_of(config.annotator)
    semantic = config.semantic()
    del semantic["verdicts"]  # the dataset's id stands for it
    semantic["annotator"] |= engine.identity(config.annotator, inputs["problems"], False)
    if engine.asks_endpoint:
        store.files.local_root()  # for its journal
        semantic = current_attempt(store, semantic, inputs, _keeps_failed(config))
    figures = attempt_figures(semantic)
    return Plan(config, inputs, semantic, verdicts.parts, figures, verdicts.part_rows)


def _keeps_failed(config: AnnotateConfig) -> bool:
    return getattr(config.annotator, "keep_failed", True)


class _Maker:
    """Annotates one part at a time with one open engine."""

    def __init__(self, plan: Plan, draft: Draft) -> None:
        config: AnnotateConfig = plan.config
        self._plan, self._draft = plan, draft
        annotator: Any = config.annotator
        self._asks_endpoint = engine_of(annotator).asks_endpoint
        rows = plan.inputs["verdicts"].rows
        folders: dict[str, Any] = {}
        if self._asks_endpoint:
            folders = _folders(config, first_attempt(plan.semantic, plan.inputs, draft))
            self._spending = open_spending(annotator, folders["journal"], rows, _show)
        else:
            self._spending = Spending(rows=rows, tell=_show)
        done = [part for part in range(plan.parts) if draft.has_sound_part(part)]
        for part in done:
            self._spending.count(*part_usage(draft.read_part(part)))
        self._annotator: Any = open_annotator(
            annotator,
            config.segment,
            spending=self._spending,
            parts=self._missing,
            **folders,
        )
        if self._asks_endpoint:
            for part in self._recurring(done):
                made = draft.read_part(part)
                problems, rollouts, verdicts = self._tables(part)
                self._annotator.recall(problems, bearing(made, rollouts), bearing(made, verdicts))

    def __call__(self, part: int) -> pa.Table:
        table = self._annotator.annotate(*self._tables(part))
        rows, usage = part_usage(table)
        if not self._asks_endpoint:  # an engine that does counts each row
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

    def _recurring(self, done: list[int]) -> list[int]:
        """The finished parts with a problem that a missing part has too: they may share answers."""

        if not done:
            return []
        problems = self._plan.inputs["problems"]
        texts = [problems.read_part(n, ["problem"])["problem"] for n in range(self._plan.parts)]
        missing = pa.concat_arrays(
            [pa.array([], pa.string())]
            + [texts[n].combine_chunks() for n in range(self._plan.parts) if n not in done]
        )
        return [part for part in done if pc.any(pc.is_in(texts[part], missing)).as_py()]

    def _missing(self) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
        parts = range(self._plan.parts)
        return (self._tables(part) for part in parts if not self._draft.has_part(part))

    def close(self) -> None:
        self._annotator.close()


def _show(rows: object = None, **figures: object) -> None:
    """Figures of the live line, which counts rows itself."""
    show_fields(**figures)


def _folders(config: AnnotateConfig, draft: Draft) -> dict[str, Any]:
    """Where a paid engine keeps what it must not pay for twice. draft: the first attempt.

    Raises:
        InputError: batches of this dataset are out, and the engine would ask their questions again.
    """
    batches = draft.local_path("batches")
    jobs = read_jobs(batches)
    if jobs and not getattr(config.annotator, "batch", False):
        raise InputError(
            f"{draft.ref}: {len(jobs)} batches of its questions are out; run with "
            "annotator.batch=true, which waits for their answers, or cancel them "
            f"(`trace-opd batches {draft.files.root} --cancel`) and run so once for what is there"
        )
    journal = draft.local_path(JOURNAL)
    stage = journal.parent.parent

    def elsewhere() -> list[Path]:  # a dataset may be begun while this one is made
        others = draft.files.local_folders(draft.stage, JOURNAL)
        return [folder for folder in others if folder != journal]

    return {
        "journal": journal,
        "elsewhere": elsewhere,
        "claims": stage.parent / CLAIMS,
        "batches": batches,
    }


def _bill(plan: Plan, draft: Draft) -> dict[str, Any]:
    """What the journal says of the dataset's requests, over all its runs."""
    annotator = plan.config.annotator
    if not engine_of(annotator).asks_endpoint:
        return {}
    journal = first_attempt(plan.semantic, plan.inputs, draft).local_path(JOURNAL)
    return read_bill(journal, find_price(annotator)).figures()


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    summary = summarize(tables)
    budget_usd = getattr(plan.config.annotator, "budget_usd", None)
    if budget_usd is not None:
        summary["budget_usd"] = budget_usd
    return summary


def _check(config: AnnotateConfig, dataset: Dataset) -> None:
    """Refuse to go on with a finished dataset of which too much failed.

    Raises:
        TooManyFailed: more than `annotator.max_failed_share` of the rows that were asked about.
    """
    if _keeps_failed(config):
        return
    most = getattr(config.annotator, "max_failed_share", 1.0)
    status, unanswered = dataset.summary["status"], dataset.summary.get(UNANSWERED, 0)
    asked = sum(status.values()) - status.get(AnnotationStatus.SKIPPED, 0)
    failed = status.get(AnnotationStatus.FAILED, 0)
    if failed <= most * asked:
        return
    again = f"run the same command again, which asks for {unanswered} of them again, or "
    raise TooManyFailed(
        f"{dataset.ref} is finished, but {failed} of {asked} rows failed, more than "
        f"annotator.max_failed_share={most:g}; {again if unanswered else ''}"
        "go on with it by annotator.keep_failed=true"
    )


STAGE = Stage(
    "annotate",
    AnnotateConfig,
    ANNOTATIONS,
    _resolve,
    lambda plan, draft: closing(_Maker(plan, draft)),
    _summarize,
    check=_check,
    measure=_bill,
    one_process=lambda config: engine_of(config.annotator).asks_endpoint,
)
