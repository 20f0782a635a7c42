"""A chat completion as JSON: the request's body, the check of a response, the answer in a record.

Shared by single requests, the Batch API, the budget and the estimate, so that all send the same
bodies, keep the same records under the same keys, and read them alike.
"""

from collections.abc import Callable, Collection
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from ...schemas.configs import PaidEndpoint
from .. import endpoint
from .journal import request_key
from .questions import Answer, Question, token_count

_SHOWN_BYTES = 1000  # of a body that is none: more than an error's sentence shows


class _Message(BaseModel):
    content: str | list[Any] | None = None
    refusal: Any = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: Any = None


class _Body(BaseModel):
    """The part of a chat completion without which there is no answer.

    The rest is read leniently: an answer is paid for whatever its usage is.
    """

    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


def request_body(
    config: PaidEndpoint,
    question: Question,
    refused: Collection[str] = (),
) -> dict[str, Any]:
    """The body of a request to /chat/completions.

    refused: optional parameters that the endpoint doesn't take: temperature; max_tokens, replaced
    by max_completion_tokens; response_format with a schema, replaced by json_object unless that is
    refused too.
    """
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    body: dict[str, Any] = {
        "model": config.model,
        "messages": question.messages,
        limit: question.max_new_tokens,
    }
    if "temperature" not in refused:
        body["temperature"] = question.temperature
    if config.structured and "response_format" not in refused:
        schema = {"name": question.schema_name, "schema": question.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif config.structured and "json_object" not in refused:
        body["response_format"] = {"type": "json_object"}
    return body


def question_key(config: PaidEndpoint, question: Question) -> str:
    """The journal's key of a question, the same for single requests and batches."""
    return request_key(
        config.base_url,
        config.model,
        question.messages,
        question.schema if config.structured else None,
        {"temperature": question.temperature, "max_new_tokens": question.max_new_tokens},
        question.prompt_version,
        question.sample_index,
    )


def checked_body(content: bytes) -> dict[str, Any]:
    """The response's body as JSON, if it is a chat completion.

    Raises:
        NotACompletion: it is something else (HTML, half a body, no choices).
    """
    try:
        body = from_json(content)
        _Body.model_validate(body)
    except ValueError as error:  # not JSON, or another kind
        fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise endpoint.NotACompletion(f"{fault} in {content[:_SHOWN_BYTES]!r}") from None
    return body


def read_record(record: dict[str, Any]) -> Answer:
    """The answer in a journalled record.

    record: "latency_s"; "body" as `checked_body` gives it; "batched" if a batch interface answered;
    "at_most", the request's most prompt and completion tokens, where the usage is unknown.

    Raises:
        ValueError: there is no chat completion in it.
    """
    body = _Body.model_validate(record.get("body"))
    message, finish_reason = body.choices[0].message, body.choices[0].finish_reason
    refused = isinstance(message.refusal, str) and message.refusal != ""
    usage = body.usage if isinstance(body.usage, dict) else {}
    details, latency_s = usage.get("prompt_tokens_details"), record.get("latency_s")
    cached = token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
    match record.get("at_most"):
        case [prompt, completion] if None not in (token_count(prompt), token_count(completion)):
            at_most = prompt, completion
        case _:
            at_most = None
    return Answer(
        message.refusal if refused else _text(message.content),
        cut=finish_reason == "length",
        refused=refused,
        prompt_tokens=token_count(usage.get("prompt_tokens")),
        completion_tokens=token_count(usage.get("completion_tokens")),
        latency_s=latency_s if isinstance(latency_s, float) and 0 <= latency_s < 1e9 else 0.0,
        # DeepSeek has its own name for cached tokens.
        cached_tokens=cached or token_count(usage.get("prompt_cache_hit_tokens")) or 0,
        batched=record.get("batched") is True,
        at_most=at_most,
    )


def bounded(
    record: dict[str, Any], at_most: Callable[[], tuple[int, int] | None]
) -> dict[str, Any]:
    """The record with "at_most" if its usage is unknown, so that a budget can count it."""
    answer = read_record(record)
    if answer.prompt_tokens is not None and answer.completion_tokens is not None:
        return record
    return record | {"at_most": at_most()}


def is_answer(record: dict[str, Any]) -> bool:
    """Whether a record can be read: a journal's file may hold anything."""
    try:
        read_record(record)
    except ValueError:
        return False
    return True


def _text(content: str | list[Any] | None) -> str:
    """The text of a message; of a list of parts those of type text. Reasoning is not an answer."""
    if not isinstance(content, list):
        return content or ""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        for part in content
    ]
    return "".join(text for text in texts if isinstance(text, str))
