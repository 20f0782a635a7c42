"""Annotation by OpenAI's Batch API, engine `openai` with `batch=true`.

Questions go out as files, answers come back within a day. All answers are journalled under the keys
of the engine that asks one by one, so either engine finds what the other has paid for.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...schemas.configs import OpenAIAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS
from .. import endpoint
from ..paid.budget import BudgetSpent
from ..paid.completion import bounded, question_key, read_record, request_body
from ..paid.conversations import KEPT
from ..paid.journal import Journal
from ..paid.journal_lines import Answered, Record, Reserved, Unanswered
from ..paid.questions import Answer, Question
from ..paid.spending import Spending, exclusive
from ..progress import count_rows
from .batch_client import Batch, BatchClient, RequestFailed
from .batch_jobs import FINAL, JobFile, RequestFile, read_jobs, remove_unfinished
from .dialogue import replay
from .prompting import AnnotationPrompt
from .rows import NO_ANSWER, SKIPPED, Identity, Item, Reading, annotation_row, items

logger = logging.getLogger(__name__)

_LINES_PER_WRITE = 1000  # of a batch's results, into the journal at once

Tables = tuple[pa.Table, pa.Table, pa.Table]  # problems, rollouts, verdicts of one part


class BatchAnnotator:
    """Asks in rounds: first questions of all rows, then those that answers have given rise to."""

    def __init__(
        self,
        config: OpenAIAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        journal: Journal,
        spending: Spending,
        folder: Path,
        parts: Callable[[], Iterable[Tables]],
    ) -> None:
        """folder: where jobs are remembered. parts: those whose questions go out together, since a
        batch may take a day; called once per round.

        Raises:
            InputError: a missing key, another process with the same batches.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._prompt, self._segment = config, prompt, segment
        self._journal, self._folder, self._spending = journal, folder, spending
        self._parts: Callable[[], Iterable[Tables]] | None = parts
        self._client = BatchClient(
            config.base_url,
            config.api_key_env,
            config.max_attempts,
            config.timeout_s,
            config.patience_s,
        )
        self._lock = exclusive(folder / "lock", "asks this dataset's questions in batches")
        self._who = Identity(config.name, config.model, prompt.version, prompt.reflection)
        self._refused: set[str] = set()
        self._failed: dict[str, str] = {}  # sentence by journal key, for this run
        remove_unfinished(folder)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`. The first call asks the questions of all parts.

        Raises:
            InputError: a batch that failed, expired or was cancelled, more than half of a round's
                requests failing, a spent budget. Answers that arrived are in the journal.
        """
        if self._parts is not None:
            self._fill(self._parts)
            self._parts = None
        self._fill(lambda: [(problems, rollouts, verdicts)])
        work = list(items(problems, rollouts, verdicts, self._segment))
        return ANNOTATIONS.table(self._row(item) for item in work)

    def close(self) -> None:
        self._client.close()
        self._journal.close()
        self._spending.close()
        self._lock.close()

    def _fill(self, parts: Callable[[], Iterable[Tables]]) -> None:
        """Ask until no row of these parts has an open question; answers go into the journal."""
        jobs = self._submitted()
        while jobs or (jobs := self._submit(parts)):
            self._collect(jobs)
            jobs = []

    def recall(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
        """See `EndpointAnnotator.recall`."""
        for item in items(problems, rollouts, verdicts, self._segment):
            if item.correct is not None:
                self._spending.made(item.rollout_id, self._replayed(item)[0])

    def _row(self, item: Item) -> dict[str, Any]:
        if item.correct is None:
            self._spending.row({})
            count_rows()
            return annotation_row(item, self._who, SKIPPED)
        answers, outcome = self._replayed(item)
        if isinstance(outcome, Question):
            error = self._failed[self._key(outcome)]
            outcome = Reading(AnnotationStatus.FAILED, error=error)
        raw = list(answers.values())[-1].text if answers else None
        self._spending.row(answers)
        count_rows()
        used = self._spending.charge(item.rollout_id, answers)
        return annotation_row(item, self._who, outcome, used, raw)

    def _replayed(self, item: Item) -> tuple[dict[str, Answer], Reading | Question]:
        """The row's answers by question, and their reading or the question that is open."""
        keys: list[str] = []

        def known(question: Question) -> Answer | None:
            keys.append(self._key(question))
            return self._known(keys[-1])

        answers, outcome = replay(self._prompt, item, self._config, known)
        return dict(zip(keys, answers, strict=False)), outcome

    def _key(self, question: Question) -> str:
        return question_key(self._config, question)

    def _known(self, key: str) -> Answer | None:
        record = self._journal.get(key)
        return None if record is None else read_record(record)

    def _submitted(self) -> list[JobFile]:
        """Jobs of an earlier process, submitted from whatever step they had reached."""
        jobs = read_jobs(self._folder)
        for file in jobs:
            self._refused.update(file.job.refused)
            self._send(file)
        return jobs

    def _send(self, file: JobFile) -> None:
        if self._spending.budget is not None:
            file.reservation = self._spending.budget.hold(file.job.worst_case_usd)
        self._client.submit(file)

    def _submit(self, parts: Callable[[], Iterable[Tables]]) -> list[JobFile]:
        """A round's jobs: all open questions that the budget has room for; none if none is open."""
        jobs: list[JobFile] = []
        asked: set[str] = set()
        requests = RequestFile(self._folder, self._config, self._refused)

        def send() -> None:
            if (file := requests.close()) is not None:
                jobs.append(file)
                self._send(file)

        for key, question in self._open_questions(parts()):
            if key in asked:
                continue
            body = request_body(self._config, question, self._refused)
            price = self._spending.price
            worst = 0.0 if price is None else price.worst_case_usd(body, batched=True)
            if not self._room(requests.worst_case_usd + worst, more_comes=bool(asked)):
                break
            if not requests.add(key, body, worst):
                send()
                requests = RequestFile(self._folder, self._config, self._refused)
                requests.add(key, body, worst)
            asked.add(key)
        send()
        return jobs

    def _open_questions(self, parts: Iterable[Tables]) -> Iterator[tuple[str, Question]]:
        for tables in parts:
            for item in items(*tables, self._segment):
                if item.correct is None:
                    continue
                _, outcome = self._replayed(item)
                if isinstance(outcome, Question):
                    key = self._key(outcome)
                    if key not in self._failed:
                        yield key, outcome

    def _room(self, worst_case_usd: float, more_comes: bool) -> bool:
        """Whether the budget has room for this round so far. more_comes: answers may make room.

        Raises:
            InputError: it has none, and no answer can make any.
        """
        budget = self._spending.budget
        if budget is None:
            return True
        try:
            reservation = budget.take(worst_case_usd)
        except BudgetSpent as error:
            if more_comes:
                return False
            raise InputError(
                f"annotator {self._config.name}: {error}, at {self._spending.price}; raise "
                f"annotator.budget_usd and run again: {KEPT}"
            ) from None
        if reservation is not None:
            budget.release(reservation)
        return reservation is not None

    def _collect(self, jobs: list[JobFile]) -> None:
        """Wait for all jobs and keep their answers; faults are raised when all are in."""
        outcomes: Counter[str] = Counter()
        faults: list[str] = []
        waiting = list(jobs)
        while waiting:
            for file in list(waiting):
                batch = self._client.refresh(file)
                if batch.status in FINAL:
                    waiting.remove(file)
                    outcomes += self._keep(file, batch)
                    if batch.status != "completed":
                        faults.append(self._client.fault(file, batch))
            self._show(jobs)
            if waiting:
                time.sleep(self._config.batch_poll_s)
        if not faults and outcomes["failed"] > outcomes["answered"]:
            last = self._failed[next(reversed(self._failed))].removeprefix(NO_ANSWER)
            faults.append(f"{outcomes['failed']} requests failed ({last})")
        if faults:
            raise InputError(
                f"annotator {self._config.name} at {self._config.base_url}: {faults[0]}; {KEPT}: "
                "run again for the rest"
            )

    def _keep(self, file: JobFile, batch: Batch) -> Counter[str]:
        """A final batch's answers into the journal. Counts what was answered and what failed."""
        counts: Counter[str] = Counter()
        costs: list[float | None] = []
        possibly_usd = 0.0
        results = self._client.results(file, batch)
        while lines := list(islice(results, _LINES_PER_WRITE)):
            kept = [(key, outcome) for key, outcome in lines if not isinstance(outcome, Exception)]
            # After a kill the journal may have a part of them, already counted as spent.
            fresh = [
                Answered(key, bounded(record, lambda key=key: file.bounds.get(key)))
                for key, record in kept
                if self._journal.get(key) is None
            ]
            lost = self._lost(file, lines)
            faults = [
                Unanswered(key, _kind(outcome))
                for key, outcome in lines
                if isinstance(outcome, Exception)
            ]
            self._journal.append([*fresh, *lost, *faults])
            for fault in faults:
                self._spending.unanswered(fault.reason)
            costs += [self._billed_usd(answer.record) for answer in fresh]
            possibly_usd += sum(reserved.usd for reserved in lost)
            counts["answered"] += len(kept)
            for key, outcome in lines:
                if isinstance(outcome, Exception):
                    counts["failed"] += self._fails(key, outcome, file.job.refused)
        if file.reservation is not None and self._spending.budget is not None:
            known = [cost for cost in costs if cost is not None]
            spent_usd = sum(known) if len(known) == len(costs) else None
            file.reservation.settle(spent_usd, possibly_usd)
            self._spending.budget.release(file.reservation)
        file.collected(counts["answered"])
        return counts

    def _billed_usd(self, record: Record) -> float | None:
        price = self._spending.price
        return None if price is None else price.billed_usd(read_record(record))

    def _lost(self, file: JobFile, lines: list[tuple[str, Record | Exception]]) -> list[Reserved]:
        """Answers that were billed and can't be kept count at their worst case, in later runs
        too.
        """
        price = self._spending.price
        if self._spending.budget is None or price is None:
            return []
        return [
            Reserved(
                f"{file.path.stem}-{key}",
                price.of_tokens(*file.bounds[key], batched=True)
                if key in file.bounds
                else file.job.worst_case_usd,
            )
            for key, outcome in lines
            if isinstance(outcome, endpoint.NotACompletion)
            or (isinstance(outcome, RequestFailed) and outcome.billed)
        ]

    def _fails(self, key: str, error: Exception, refused: Collection[str]) -> bool:
        """Whether a request is given up: without a parameter that is refused it is asked again."""
        passing = True
        if isinstance(error, RequestFailed):
            name = endpoint.refused_parameter(error, refused)  # type: ignore[arg-type]
            if name is not None and name not in refused:
                if name not in self._refused:
                    logger.warning(
                        "%s refuses %s: going on without it", self._config.base_url, name
                    )
                self._refused.add(name)
                return False
            passing = error.passing
        self._failed[key] = (NO_ANSWER if passing else "") + self._client.sentence(error)
        return True

    def _show(self, jobs: list[JobFile]) -> None:
        statuses = Counter(file.job.status for file in jobs)
        done, total = (sum(getattr(f.job, n) for f in jobs) for n in ("completed", "requests"))
        listed = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        self._spending.tell(batches=listed, answers=f"{done}/{total}")


def _kind(error: Exception) -> str:
    """As `endpoint.failure_kind`."""
    return error.kind if isinstance(error, RequestFailed) else endpoint.failure_kind(error)
