"""A question to a model, its answer, and what answers use. Annotators and judges hold dialogues.

A dialogue yields the next question, is sent its answer and returns what it has read. It sends
nothing itself: one engine awaits answers, another batches them, the estimate stops at the first
unknown one.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

# Factor on the limit for an answer that was cut: the same limit would cut it again.
RAISED_LIMIT = 4

Messages = list[dict[str, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One request.

    schema: of the answer; schema_name: its name in the request; prompt_version: of the file that
    the messages are made from; sample_index: tells equal questions apart that are asked again.
    """

    messages: Messages
    max_new_tokens: int
    temperature: float
    schema: dict[str, Any]
    prompt_version: str
    schema_name: str
    sample_index: int = 0


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


Dialogue = Generator[Question, Answer, T]


@dataclass(frozen=True)
class Usage:
    """Tokens, cost and time of answers. None: unknown."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    cost_usd: float | None = 0.0
    latency_s: float = 0.0


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
