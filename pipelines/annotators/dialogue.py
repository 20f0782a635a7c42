"""The conversation with an annotator, without the sending: one engine awaits answers, two batch
them.

`dialogue` yields the next question, is sent the answer and returns the reading. Called by the
engines that ask a model, and by the estimate.
"""

from collections.abc import Callable
from dataclasses import replace

from ...schemas.configs import AnnotatorPrompt
from ...schemas.labels import AnnotationStatus
from ..paid.questions import RAISED_LIMIT, Answer, Dialogue, Question
from .answers import read_answer
from .prompting import AnnotationPrompt, ask, correct
from .rows import Item, Reading

_SCHEMA_NAME = "annotation"


def dialogue(prompt: AnnotationPrompt, item: Item, config: AnnotatorPrompt) -> Dialogue[Reading]:
    """Ask; once more with a raised limit if the answer was cut; correct an answer that is
    invalid.
    """
    question = Question(
        ask(prompt, item),
        config.max_new_tokens,
        prompt.schemas[item.kind],
        prompt.version,
        _SCHEMA_NAME,
    )
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
