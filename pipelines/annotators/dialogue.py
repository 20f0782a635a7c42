"""The conversation with an annotator, without the sending: one engine awaits answers, two batch
them.

Called by the engines that ask a model, and by the estimate.
"""

from collections.abc import Callable

from ...schemas.configs import AnnotatorPrompt
from ...schemas.labels import AnnotationStatus
from ..paid.dialogue import Unusable
from ..paid.dialogue import dialogue as converse
from ..paid.dialogue import replay as replay_talk
from ..paid.questions import Answer, Dialogue, Question
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
        config.temperature,
        prompt.schemas[item.kind],
        prompt.version,
        _SCHEMA_NAME,
    )

    def read(text: str) -> Reading:
        reading = read_answer(text, prompt, item)
        if reading.status is AnnotationStatus.INVALID:
            raise Unusable(reading.error or "")
        return reading

    outcome = yield from converse(
        question,
        read,
        lambda answer, error: correct(prompt, item, answer, error),
        config.corrective_turns,
    )
    if isinstance(outcome, Reading):
        return outcome
    if outcome.refused:
        return Reading(AnnotationStatus.ABSTAINED, error="the annotator refused")
    return Reading(AnnotationStatus.INVALID, error=outcome.error)


def replay(
    prompt: AnnotationPrompt,
    item: Item,
    config: AnnotatorPrompt,
    known: Callable[[Question], Answer | None],
) -> tuple[list[Answer], Reading | Question]:
    """Go through a dialogue as far as its answers are known.

    Returns the answers, and their reading or the question that is still open.
    """
    return replay_talk(dialogue(prompt, item, config), known)
