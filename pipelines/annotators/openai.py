"""Annotation by a model behind any OpenAI-compatible chat endpoint, engine `openai`.

Rows are made here, paid/conversations.py asks. `batch=true` asks through the Batch API instead
(openai_batch.py).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...data.store import Dataset
from ...schemas.configs import OpenAIAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus
from ...schemas.tables import ANNOTATIONS
from ...trace.protocols import Annotator
from .. import endpoint
from ..paid.claims import Claims
from ..paid.completion import is_answer, request_body
from ..paid.conversations import Conversations, Failure, Held
from ..paid.journal import Journal
from ..paid.prices import find_price
from ..paid.questions import Dialogue
from ..paid.spending import Spending, open_spending
from ..progress import count_rows
from . import Engine
from .dialogue import dialogue
from .prompting import AnnotationPrompt, prompt_of
from .rows import NO_ANSWER, SKIPPED, Identity, Item, Reading, annotation_row, items


class EndpointAnnotator:
    """Annotates over HTTP. Client, pace and counts live as long as the annotator does."""

    def __init__(
        self,
        config: OpenAIAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        journal: Journal | None,
        spending: Spending,
    ) -> None:
        self._config, self._prompt, self._segment = config, prompt, segment
        self._spending = spending
        self._who = Identity(config.name, config.model, prompt.version, prompt.reflection)
        name = f"annotator {config.name}"
        self._conversations = Conversations(config, name, journal, spending)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`. Raises as `Conversations.hold`."""
        work = items(problems, rollouts, verdicts, self._segment)
        talks = ((item, self._talk(item)) for item in work)
        held = self._conversations.hold(talks, rollouts.num_rows, lambda item: count_rows())
        return ANNOTATIONS.table(map(self._row, held))

    def recall(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> None:
        """Note rows of an earlier run that bear their answers' cost: later rows share them free."""
        for item in items(problems, rollouts, verdicts, self._segment):
            if (talk := self._talk(item)) is not None:
                self._conversations.recall(item.rollout_id, talk)

    def close(self) -> None:
        self._conversations.close()

    def _talk(self, item: Item) -> Dialogue[Reading] | None:
        return None if item.correct is None else dialogue(self._prompt, item, self._config)

    def _row(self, held: Held[Item, Reading]) -> dict[str, Any]:
        item, reading, answers = held.about, held.outcome or SKIPPED, held.answers
        if isinstance(reading, Failure):
            error = f"{NO_ANSWER if reading.passing else ''}{reading.error}"
            reading = Reading(AnnotationStatus.FAILED, error=error)
        raw = list(answers.values())[-1].text if answers else None
        used = self._spending.charge(item.rollout_id, answers)
        return annotation_row(item, self._who, reading, used, raw)


def _identity(config: OpenAIAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    identity = prompt_of(config).sha256
    endpoint.read_key(config.api_key_env, "annotator.api_key_env")
    find_price(config)
    if in_training and config.batch:
        raise InputError(
            "online.annotator.batch is true, and a step would wait a day for its answers; set "
            "it to false"
        )
    return dict(identity)


def _open(
    config: OpenAIAnnotator,
    segment: SegmentConfig,
    *,
    journal: Path | None = None,
    elsewhere: Callable[[], Iterable[Path]] = lambda: (),
    claims: Path | None = None,
    spending: Spending | None = None,
    **batch: Any,
) -> Annotator:
    prompt = prompt_of(config)
    kept = None
    if journal is not None:
        shared = Claims(claims) if claims is not None else None
        kept = Journal(journal, elsewhere, is_answer, shared)
    spending = spending or open_spending(config, journal)
    if not config.batch:
        return EndpointAnnotator(config, prompt, segment, kept, spending)
    from .openai_batch import BatchAnnotator

    assert kept is not None, "batches are journalled"
    return BatchAnnotator(config, prompt, segment, kept, spending, batch["batches"], batch["parts"])


ENGINE = Engine(_identity, _open, asks_endpoint=True, request_body=request_body)
