"""A conversation about one thing, without the sending. Annotators and judges hold it.

`dialogue` yields the next question, is sent the answer and returns what was read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from .questions import RAISED_LIMIT, Answer, Dialogue, Messages, Question

T = TypeVar("T")


class Unusable(Exception):
    """An answer that can't be used; its text says why."""


@dataclass(frozen=True)
class NoReading:
    """The last answer was refused, or can't be used; error says why."""

    refused: bool
    error: str


def dialogue(
    question: Question,
    read: Callable[[str], T],
    correct: Callable[[str, str], Messages],
    corrective_turns: int,
) -> Dialogue[T | NoReading]:
    """Ask; once more with a raised limit if the answer was cut; correct an answer that is
    invalid.

    read: raises Unusable for an answer that is; correct: the next messages, from the answer and
    what is wrong with it.
    """
    corrections = 0
    raised = False
    while True:
        answer = yield question
        if answer.refused:
            return NoReading(True, "it refused")
        if answer.cut and not raised:
            raised = True
            question = replace(question, max_new_tokens=question.max_new_tokens * RAISED_LIMIT)
            continue
        try:
            return read(answer.text)
        except Unusable as unusable:
            error = str(unusable)
        if answer.cut:
            error = f"it was cut at the limit of {question.max_new_tokens} tokens"
        if corrections == corrective_turns:
            return NoReading(False, error)
        corrections += 1
        correction = correct(answer.text, error)
        question = replace(question, messages=[*question.messages, *correction])


def replay(
    talk: Dialogue[T], known: Callable[[Question], Answer | None]
) -> tuple[list[Answer], T | Question]:
    """Go through a dialogue as far as its answers are known.

    Returns the answers, and what was read or the question that is still open.
    """
    answers: list[Answer] = []
    question = next(talk)
    try:
        while (answer := known(question)) is not None:
            answers.append(answer)
            question = talk.send(answer)
    except StopIteration as done:
        return answers, done.value
    return answers, question
