"""What an annotation run will ask and cost, told before its first request."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.store import Draft
from ...schemas.configs import AnnotateConfig, OpenAIAnnotator, SelfAnnotator
from ...schemas.labels import AnnotationStatus
from ..annotators.batch_jobs import read_jobs
from ..annotators.completion import is_answer, question_key, read_record, request_body
from ..annotators.dialogue import RAISED_LIMIT, Answer, Question, replay
from ..annotators.journal import Journal
from ..annotators.prices import Price, find_price, most_prompt_tokens
from ..annotators.prompting import AnnotationPrompt, correct, load_prompt
from ..annotators.rows import Item, items
from ..annotators.spending import count, dollars
from ..progress import progress_bar
from ..stages.attempts import first_attempt
from ..stages.base import Plan

_BYTES_PER_TOKEN = 4.0  # of English prose in common tokenizers, until an answer tells better
_MOST_ERROR_CHARS = 300  # what a correction may say about an answer


@dataclass
class Tokens:
    """Prompt and completion tokens, and what they cost."""

    prompt: float = 0.0
    completion: float = 0.0

    def usd(self, price: Price | None, batched: bool) -> float | None:
        if price is None:
            return None
        return price.of_tokens(self.prompt, self.completion) * (price.batch if batched else 1.0)


@dataclass
class Estimate:
    """Of the parts that are not there yet.

    asked: rows with an open question, one request each at first. full: one answer per row, each as
    long as its limit. most: all answers cut at the limit, asked for again, then corrected. seen:
    rows of which it is known what they took, answered: those of them that this run needs.
    """

    rows: int = 0
    asked: int = 0
    answered: int = 0
    prompt_bytes: int = 0
    full: Tokens = field(default_factory=Tokens)
    most: Tokens = field(default_factory=Tokens)
    seen: int = 0
    seen_tokens: Tokens = field(default_factory=Tokens)
    seen_bytes: int = 0  # of first prompts whose tokens are known
    seen_bytes_tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        known = self.seen_bytes_tokens
        return self.seen_bytes / known if known else _BYTES_PER_TOKEN

    @property
    def expected(self) -> Tokens | None:
        """As much per row as the rows that are known took; None if there is none."""
        if not self.seen:
            return None
        share = self.asked / self.seen
        return Tokens(self.seen_tokens.prompt * share, self.seen_tokens.completion * share)


def estimate(plan: Plan, draft: Draft) -> Estimate | None:
    """Go through all rows as the engine would, up to each one's first unknown answer.

    Sends nothing and writes nothing. None for an engine that asks nobody.
    """
    config: AnnotateConfig = plan.config
    annotator = config.annotator
    if not isinstance(annotator, OpenAIAnnotator | SelfAnnotator):
        return None
    prompt = load_prompt(annotator.prompt, annotator.answer_schema)
    known = _known(annotator, prompt, draft)
    out = Estimate()
    with progress_bar("dry run", plan.parts) as advance:
        for part in range(plan.parts):
            if draft.has_part(part):
                _see_part(out, draft.read_part(part))
            else:
                problems, rollouts, verdicts = (
                    plan.inputs[r].read_part(part) for r in ("problems", "rollouts", "verdicts")
                )
                for item in items(problems, rollouts, verdicts, config.segment):
                    _see_item(out, item, annotator, prompt, known)
            advance()
    out.full.prompt = out.prompt_bytes / out.bytes_per_token
    return out


def estimate_view(found: Estimate, plan: Plan, draft: Draft) -> Group:
    """The estimate for people: requests, tokens, US dollars, and how to read them."""
    annotator = plan.config.annotator
    paid = isinstance(annotator, OpenAIAnnotator)
    price, batched = (find_price(annotator), annotator.batch) if paid else (None, False)
    columns = {
        "expected": found.expected,
        "one full answer each": found.full,
        "at most": found.most,
    }
    table = Table("", *columns, box=None)
    turns = 2 + annotator.corrective_turns
    table.add_row("requests", "", f"{found.asked}", f"{found.asked * turns}")
    for name in ("prompt", "completion"):
        cells = [count(getattr(tokens, name) if tokens else None) for tokens in columns.values()]
        table.add_row(f"{name} tokens", *cells)
    if paid:
        costs = [dollars(tokens and tokens.usd(price, batched)) for tokens in columns.values()]
        table.add_row("cost", *costs)
    return Group(table, Text("\n".join(_notes(found, annotator, first_attempt(plan, draft)))))


def _notes(
    found: Estimate, annotator: OpenAIAnnotator | SelfAnnotator, draft: Draft
) -> Iterator[str]:
    idle = found.rows - found.asked - found.answered
    yield (
        f"{found.rows} rows to make: {found.asked} ask, {found.answered} find their answers in a "
        f"journal and are free, {idle} have no verdict."
    )
    how = "measured on answers that are there" if found.seen_bytes_tokens else "a guess"
    yield (
        f"Prompt tokens at {found.bytes_per_token:.2f} bytes each ({how}); at most: one per byte, "
        "each answer cut at its limit, then corrected."
    )
    if found.seen:
        yield f"Expected: as much per row as the {found.seen} rows whose answers are there took."
    if not isinstance(annotator, OpenAIAnnotator):
        return
    if jobs := read_jobs(draft.store.beside(f"{draft.ref}/batches")):
        asked = sum(file.job.requests for file in jobs)
        yield f"{len(jobs)} batches with {asked} of these requests are out already."
    limit = annotator.budget_usd
    yield f"Budget: {'none' if limit is None else dollars(limit)}."


def _known(
    annotator: OpenAIAnnotator | SelfAnnotator, prompt: AnnotationPrompt, draft: Draft
) -> Callable[[Question], Answer | None]:
    """What finds a question's answer in the store's journals, read without a trace."""
    if not isinstance(annotator, OpenAIAnnotator):
        return lambda question: None
    folders = draft.store.folders_beside(draft.stage, "journal")
    if not folders:
        return lambda question: None
    journal = Journal(folders[0], lambda: folders[1:], is_answer)

    def known(question: Question) -> Answer | None:
        record = journal.get(question_key(annotator, prompt, question))
        return None if record is None else read_record(record)

    return known


def _see_part(out: Estimate, table: pa.Table) -> None:
    """Rows that are made, as figures for those that are not."""
    names = ["status", "prompt_tokens", "completion_tokens"]
    for row in table.select(names).to_pylist():
        if row["status"] != AnnotationStatus.SKIPPED:
            _see_row(out, row["prompt_tokens"], row["completion_tokens"])


def _see_row(out: Estimate, prompt_tokens: int | None, completion_tokens: int | None) -> None:
    if prompt_tokens and completion_tokens:  # a failed row has none
        out.seen += 1
        out.seen_tokens.prompt += prompt_tokens
        out.seen_tokens.completion += completion_tokens


def _see_item(
    out: Estimate,
    item: Item,
    annotator: OpenAIAnnotator | SelfAnnotator,
    prompt: AnnotationPrompt,
    known: Callable[[Question], Answer | None],
) -> None:
    out.rows += 1
    if item.correct is None:
        return
    sizes: list[int] = []

    def look(question: Question) -> Answer | None:
        sizes.append(most_prompt_tokens(_body(annotator, prompt, question)))
        return known(question)

    answers, came = replay(prompt, item, annotator, look)
    for size, answer in zip(sizes, answers, strict=False):
        if answer.prompt_tokens:
            out.seen_bytes += size
            out.seen_bytes_tokens += answer.prompt_tokens
    if not isinstance(came, Question):
        out.answered += 1
        _see_row(
            out,
            sum(answer.prompt_tokens or 0 for answer in answers),
            sum(answer.completion_tokens or 0 for answer in answers),
        )
        return
    out.asked += 1
    out.prompt_bytes += sizes[-1]
    out.full.completion += came.max_new_tokens
    _add_most(out.most, sizes[-1], annotator, prompt, item)


def _body(
    annotator: OpenAIAnnotator | SelfAnnotator, prompt: AnnotationPrompt, question: Question
) -> dict[str, Any]:
    if isinstance(annotator, OpenAIAnnotator):
        return request_body(annotator, prompt, question)
    return {"messages": question.messages}


def _add_most(
    most: Tokens,
    prompt_tokens: int,
    annotator: OpenAIAnnotator | SelfAnnotator,
    prompt: AnnotationPrompt,
    item: Item,
) -> None:
    """A dialogue at its worst: the first answer cut, then each one full and invalid."""
    first, raised = annotator.max_new_tokens, annotator.max_new_tokens * RAISED_LIMIT
    said = correct(prompt, item, "", "x" * _MOST_ERROR_CHARS * 4)  # four bytes per character
    correction = most_prompt_tokens({"messages": said})
    turns = annotator.corrective_turns
    most.completion += first + raised * (1 + turns)
    most.prompt += 2 * prompt_tokens
    most.prompt += sum(prompt_tokens + k * (raised + correction) for k in range(1, turns + 1))
