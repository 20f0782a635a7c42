"""The conversation with an annotator, without the sending: one engine awaits answers, two batch
them.

`dialogue` yields the next question, is sent the answer and returns the reading. Called by the
engines that ask a model, and by the estimate.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...schemas.configs import AnnotatorPrompt
from ...schemas.labels import AnnotationStatus
from .answers import read_answer
from .prompting import AnnotationPrompt, Messages, ask, correct
from .rows import Item, Reading, Usage

# Factor on the limit for an answer that was cut: the same limit would cut it again.
RAISED_LIMIT = 4


@dataclass(frozen=True)
class Question:
    """One request to the annotator. schema: of the answer."""

    messages: Messages
    max_new_tokens: int
    schema: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer as received. tokens: None if they are unknown.

    cached_tokens: those of the prompt that the provider had in its cache; batched: whether a batch
    interface answered, at its price; at_most: bounds of unknown prompt and completion tokens.
    """

    text: str
    cut: bool = False
    refused: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0
    cached_tokens: int = 0
    batched: bool = False
    at_most: tuple[int, int] | None = None


Dialogue = Generator[Question, Answer, Reading]


def dialogue(prompt: AnnotationPrompt, item: Item, config: AnnotatorPrompt) -> Dialogue:
    """Ask; once more with a raised limit if the answer was cut; correct an answer that is
    invalid.
    """
    question = Question(ask(prompt, item), config.max_new_tokens, prompt.schemas[item.kind])
    corrections = 0
    raised = False
    while True:
        answer = yield question
        if answer.refused:
            return Reading(AnnotationStatus.ABSTAINED, error="the annotator refused")
        if answer.cut and not raised:
            raised = True
            question = replace(question, max_new_tokens=question.max_new_tokens * RAISED_LIMIT)
            continue
        reading = read_answer(answer.text, prompt, item)
        if reading.status is AnnotationStatus.INVALID and answer.cut:
            reading = replace(
                reading, error=f"it was cut at the limit of {question.max_new_tokens} tokens"
            )
        if reading.status is not AnnotationStatus.INVALID or corrections == config.corrective_turns:
            return reading
        corrections += 1
        correction = correct(prompt, item, answer.text, reading.error or "")
        question = replace(question, messages=[*question.messages, *correction])


def replay(
    prompt: AnnotationPrompt,
    item: Item,
    config: AnnotatorPrompt,
    known: Callable[[Question], Answer | None],
) -> tuple[list[Answer], Reading | Question]:
    """Go through a dialogue as far as its answers are known.

    Returns the answers, and their reading or the question that is still open.
    """
    talk = dialogue(prompt, item, config)
    answers: list[Answer] = []
    question = next(talk)
    try:
        while (answer := known(question)) is not None:
            answers.append(answer)
            question = talk.send(answer)
    except StopIteration as done:
        return answers, done.value
    return answers, question


def usage(answers: Sequence[Answer], cost_usd: float | None = None) -> Usage:
    """Tokens and time of all turns, with what they cost."""
    return Usage(
        _total([answer.prompt_tokens for answer in answers]),
        _total([answer.completion_tokens for answer in answers]),
        cost_usd,
        sum(answer.latency_s for answer in answers),
    )


def token_count(value: object) -> int | None:
    """A number of tokens; None (unknown) for anything else, and beyond the tables' int32."""
    return value if type(value) is int and 0 <= value < 2**31 else None


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return token_count(sum(known)) if len(known) == len(counts) else None
