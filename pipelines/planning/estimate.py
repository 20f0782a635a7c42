"""What an annotation run will ask and cost, shown before its first request (`--dry-run`).

Called by the command line (cli/show.py), by the plan of a pipeline (cost.py) and by
judge_estimate.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.store import Draft
from ...schemas.configs import AnnotateConfig, PaidEndpoint
from ...schemas.labels import AnnotationStatus
from ..annotators import Engine, engine_of
from ..annotators.attempts import first_attempt
from ..annotators.batch_jobs import read_jobs
from ..annotators.dialogue import dialogue
from ..annotators.prompting import AnnotationPrompt, correct, prompt_of
from ..annotators.rows import Item, items
from ..paid.completion import is_answer, question_key, read_record
from ..paid.dialogue import replay
from ..paid.journal import Journal
from ..paid.keeping import JOURNAL
from ..paid.prices import Price, find_price, most_prompt_tokens
from ..paid.questions import RAISED_LIMIT, Answer, Dialogue, Question
from ..paid.spending import count, dollars
from ..progress import progress_bar
from ..stages.base import Plan

_BYTES_PER_TOKEN = 4.0  # of English prose in common tokenizers, until an answer is measured
# What a correction says about an answer, at its longest: four bytes per character.
LONGEST_ERROR = "x" * 300 * 4


@dataclass
class Tokens:
    """Prompt and completion tokens, and what they cost."""

    prompt: float = 0.0
    completion: float = 0.0

    def usd(self, price: Price | None, batched: bool) -> float | None:
        return None if price is None else price.of_tokens(self.prompt, self.completion, batched)


@dataclass
class Estimate:
    """Of the parts that are not made yet.

    asked: open questions, one request each at first. shared: rows with an open question that an
    earlier row asks. answered: rows whose answers a journal has. full: one answer per question,
    each as long as its limit. most: all answers cut at the limit, asked for again, then corrected.
    seen: rows whose tokens are known, made or answered.
    """

    rows: int = 0
    asked: int = 0
    shared: int = 0
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
        """As much per row as the rows whose tokens are known; None if there is none."""
        if not self.seen:
            return None
        share = self.asked / self.seen
        return Tokens(self.seen_tokens.prompt * share, self.seen_tokens.completion * share)

    def see(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Count a row as one whose tokens are known; a failed row has none."""
        if prompt_tokens and completion_tokens:
            self.seen += 1
            self.seen_tokens.prompt += prompt_tokens
            self.seen_tokens.completion += completion_tokens


def estimate(plan: Plan, draft: Draft) -> Estimate | None:
    """Go through all rows as the engine would, up to the first unknown answer of each.

    Sends nothing and writes nothing. None for an engine that asks no model.
    """
    config: AnnotateConfig = plan.config
    annotator: Any = config.annotator
    engine = engine_of(annotator)
    if engine.request_body is None:
        return None
    asking, prompt = Asking.of(annotator, engine, draft), prompt_of(annotator)
    out = Estimate()
    with progress_bar("dry run", plan.parts) as progress:
        for part in range(plan.parts):
            if draft.has_part(part):
                _see_part(out, draft.read_part(part))
            else:
                problems, rollouts, verdicts = (
                    plan.inputs[r].read_part(part) for r in ("problems", "rollouts", "verdicts")
                )
                for item in items(problems, rollouts, verdicts, config.segment):
                    _see_item(out, item, prompt, asking)
            progress.advance()
    out.full.prompt = out.prompt_bytes / out.bytes_per_token
    return out


def estimate_view(found: Estimate, plan: Plan, draft: Draft) -> Group:
    """The estimate for people: requests, tokens, US dollars, and how to read them."""
    annotator = plan.config.annotator
    paid = engine_of(annotator).asks_endpoint
    first = first_attempt(plan.semantic, plan.inputs, draft) if paid else None
    return estimate_table(found, annotator, paid, first, "rows")


def estimate_table(
    found: Estimate, asked: Any, paid: bool, first: Draft | None, unit: str
) -> Group:
    """first: the draft that has the batches; unit: what is counted."""
    columns = {
        "expected": found.expected,
        "one full answer each": found.full,
        "at most": found.most,
    }
    table = Table("", *columns, box=None)
    turns = 2 + asked.corrective_turns
    table.add_row("requests", "", f"{found.asked}", f"{found.asked * turns}")
    for name in ("prompt", "completion"):
        cells = [count(getattr(tokens, name) if tokens else None) for tokens in columns.values()]
        table.add_row(f"{name} tokens", *cells)
    notes = list(_notes(found, unit))
    if paid:
        price, batched = find_price(asked), getattr(asked, "batch", False)
        costs = [tokens and tokens.usd(price, batched) for tokens in columns.values()]
        table.add_row("cost", *map(dollars, costs))
        notes += _money(asked, price, first, costs[1])
    return Group(table, Text("\n".join(notes)))


def _notes(found: Estimate, unit: str) -> Iterator[str]:
    idle = found.rows - found.asked - found.shared - found.answered
    shared = f"{found.shared} share the answer of another, " if found.shared else ""
    unasked = f", {idle} have no verdict or are not selected" if unit == "rows" else ""
    yield (
        f"{found.rows} {unit} to make: {found.asked} ask, {shared}{found.answered} find their "
        f"answers in a journal and are free{unasked}."
    )
    how = "measured on known answers" if found.seen_bytes_tokens else "a guess"
    yield (
        f"Prompt tokens at {found.bytes_per_token:.2f} bytes each ({how}); at most: one per byte, "
        "each answer cut at its limit, then corrected."
    )
    if found.seen:
        yield f"Expected: as much for each as for the {found.seen} {unit} whose answers are known."


def _money(
    asked: Any, price: Price | None, draft: Draft | None, full_usd: float | None
) -> Iterator[str]:
    yield f"Price: {price or 'unknown'}."
    if draft and (jobs := read_jobs(draft.files.local_path(f"{draft.ref}/batches"))):
        out = sum(file.job.requests for file in jobs)
        yield f"{len(jobs)} batches with {out} of these requests are out already."
    limit = asked.budget_usd
    short = limit is not None and full_usd is not None and limit < full_usd
    below = ", less than one full answer each costs: it may not suffice" if short else ""
    yield f"Budget: {'none' if limit is None else dollars(limit)}{below}."


@dataclass(frozen=True)
class Asking:
    """How a model is asked: its config, its requests, and the answers it has given already."""

    config: Any
    body: Callable[[Any, Question], dict[str, Any]]
    known: Callable[[Question], Answer | None]
    keys: set[str]  # of the open questions so far
    key: Callable[[Question], str] | None  # None: each row asks for itself

    @classmethod
    def of(cls, annotator: Any, engine: Engine, draft: Draft) -> "Asking":
        assert engine.request_body is not None, "engines that ask no model have no estimate"
        if not engine.asks_endpoint:
            return cls(annotator, engine.request_body, lambda question: None, set(), None)
        folders = draft.files.local_folders(draft.stage, JOURNAL)
        known = journalled(folders, annotator)
        return cls(annotator, engine.request_body, known, set(), key_of(annotator))

    def first(self, question: Question) -> bool:
        """Whether no earlier row has this open question."""
        if self.key is None:
            return True
        before = len(self.keys)
        self.keys.add(self.key(question))
        return len(self.keys) > before


def key_of(config: PaidEndpoint) -> Callable[[Question], str]:
    return partial(question_key, config)


def journalled(folders: list[Path], config: PaidEndpoint) -> Callable[[Question], Answer | None]:
    """The answers in journals, which are read, not written."""
    journal = Journal(folders[0], lambda: folders[1:], is_answer) if folders else None

    def known(question: Question) -> Answer | None:
        record = journal.get(question_key(config, question)) if journal is not None else None
        return None if record is None else read_record(record)

    return known


def _see_part(out: Estimate, table: pa.Table) -> None:
    """Rows that are made, as figures for those that are not."""
    names = ["status", "prompt_tokens", "completion_tokens"]
    for row in table.select(names).to_pylist():
        if row["status"] != AnnotationStatus.SKIPPED:
            out.see(row["prompt_tokens"], row["completion_tokens"])


def _see_item(out: Estimate, item: Item, prompt: AnnotationPrompt, asking: Asking) -> None:
    out.rows += 1
    if item.correct is None:
        return

    def correction() -> int:
        return most_prompt_tokens({"messages": correct(prompt, item, "", LONGEST_ERROR)})

    see(out, dialogue(prompt, item, asking.config), asking, correction)


def see(
    out: Estimate,
    talk: Dialogue[Any],
    asking: Asking,
    correction: Callable[[], int],
) -> None:
    """Go through a conversation up to its first unknown answer. correction: its most tokens."""
    sizes: list[int] = []

    def known(question: Question) -> Answer | None:
        sizes.append(most_prompt_tokens(asking.body(asking.config, question)))
        return asking.known(question)

    answers, outcome = replay(talk, known)
    for size, answer in zip(sizes, answers, strict=False):
        if answer.prompt_tokens:
            out.seen_bytes += size
            out.seen_bytes_tokens += answer.prompt_tokens
    if isinstance(outcome, Question) and not asking.first(outcome):
        out.shared += 1
    elif isinstance(outcome, Question):
        out.asked += 1
        out.prompt_bytes += sizes[-1]
        out.full.completion += outcome.max_new_tokens
        _add_most(out.most, sizes[-1], correction(), asking)
    else:
        out.answered += 1
        out.see(
            sum(answer.prompt_tokens or 0 for answer in answers),
            sum(answer.completion_tokens or 0 for answer in answers),
        )


def _add_most(most: Tokens, prompt_tokens: int, correction: int, asking: Asking) -> None:
    """A dialogue at its worst: the first answer cut, then each one full and invalid."""
    first = asking.config.max_new_tokens
    raised, turns = first * RAISED_LIMIT, asking.config.corrective_turns
    most.completion += first + raised * (1 + turns)
    most.prompt += 2 * prompt_tokens
    most.prompt += sum(prompt_tokens + k * (raised + correction) for k in range(1, turns + 1))
