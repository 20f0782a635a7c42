"""Read an annotator's answer: spans, or one sentence that says why it can't be used.

Called by dialogue.py. Raw answers are journalled, so a change here bills nothing.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...schemas.labels import AnnotationStatus, SpanKind, type_label
from ..paid.answer_text import read_object
from ..paid.dialogue import Unusable
from .answer_schema import MOST_REFLECTION_CHARS
from .prompting import AnnotationPrompt
from .rows import Item, Reading

_MOST_ERROR_CHARS = 300
_FEWEST_ANSWER_CHARS = 3


class _Span(BaseModel):
    model_config = ConfigDict(strict=True)

    segments: list[int]
    quote: str | None = None


class _Answer(BaseModel):
    """What every answer schema holds; further properties are checked by the schema alone."""

    model_config = ConfigDict(strict=True)

    spans: list[_Span]
    type: str
    abstain: bool = False
    reflection: Any = None


def read_answer(text: str, prompt: AnnotationPrompt, item: Item) -> Reading:
    """Read one answer strictly: nothing in it is guessed or repaired."""
    try:
        answer = _validated(read_object(text, prompt.schemas[item.kind]))
        marked = _marked(answer, item)
        idea = _reflection(answer, item) if prompt.reflection else None
    except Unusable as error:
        return Reading(AnnotationStatus.INVALID, error=str(error)[:_MOST_ERROR_CHARS])
    except RecursionError:
        return Reading(AnnotationStatus.INVALID, error="it is nested too deep")
    if answer.abstain:
        return Reading(AnnotationStatus.ABSTAINED)
    if not marked:
        return Reading(AnnotationStatus.EMPTY, reflection=idea)
    return Reading(AnnotationStatus.OK, marked, type_label(answer.type), reflection=idea)


def _validated(value: Any) -> _Answer:
    try:
        return _Answer.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Unusable(f"{where}: {first['msg']}") from None


def _marked(answer: _Answer, item: Item) -> list[list[int]]:
    """Segment indices per span, each segment where it is named first."""
    if answer.abstain and answer.spans:
        raise Unusable("abstain is true but spans are marked")
    last = len(item.segments) - 1
    seen: set[int] = set()
    marked = []
    for span in answer.spans:
        for index in span.segments:
            if not 0 <= index <= last:
                raise Unusable(f"segment {index} is not there, the last one is {last}")
        _check_quote(span, item)
        fresh = [i for i in dict.fromkeys(span.segments) if i not in seen]
        seen.update(fresh)
        if fresh:
            marked.append(fresh)
    return marked


def _check_quote(span: _Span, item: Item) -> None:
    """Raise if a quote is from other segments than those named.

    A quote that is in no segment is a paraphrase: it says nothing about the indices.
    """
    quote = _squeezed(span.quote or "")
    if not quote or quote in _squeezed(" ".join(item.text(i) for i in sorted(set(span.segments)))):
        return
    elsewhere = [i for i in range(len(item.segments)) if quote in _squeezed(item.text(i))]
    if elsewhere:
        raise Unusable(
            f"the quote of segments {span.segments} stands in segment {elsewhere[0]} instead"
        )


def _reflection(answer: _Answer, item: Item) -> str | None:
    """The corrective idea about a wrong response with marks; none is asked for without them."""
    if item.kind is SpanKind.KEY or answer.abstain:
        return None
    idea = answer.reflection if isinstance(answer.reflection, str) else ""
    if not idea.strip():
        if answer.spans:
            raise Unusable("reflection is empty, and spans are marked")
        return None
    idea = _squeezed(idea)
    if len(idea) > MOST_REFLECTION_CHARS:
        raise Unusable(f"reflection is longer than {MOST_REFLECTION_CHARS} characters")
    if states_answer(idea, item.problem["answer"]):
        raise Unusable("reflection states the final answer")
    return idea


def states_answer(text: str, answer: str) -> bool:
    """Whether a text contains a gold answer as words of their own.

    An answer of fewer than three characters is found in any text about numbers: it does not count.
    """
    gold = re.escape(answer.strip())
    long = len(answer.strip()) >= _FEWEST_ANSWER_CHARS
    return long and re.search(rf"(?<![\w.,]){gold}(?![\w]|[.,]\d)", text) is not None


def _squeezed(text: str) -> str:
    return " ".join(text.split())
