"""A chat completion as JSON: what is asked, what is checked of the response, what is read in it.

Shared by the client that sends one request at a time and by the batch interface, so that both send
the same bodies, keep the same records under the same keys, and read them alike.
"""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from ...schemas.configs import OpenAIAnnotator
from .. import endpoint
from .dialogue import Answer, Question
from .journal import request_key
from .prompting import AnnotationPrompt

_SHOWN_BYTES = 1000  # of a body that is none: more than an error's sentence shows


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    prompt_cache_hit_tokens: int | None = None  # DeepSeek's name for cached_tokens

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details or _PromptDetails()
        return details.cached_tokens or self.prompt_cache_hit_tokens or 0


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Body(BaseModel):
    """The part of a chat completion that is read; servers add and leave out the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def request_body(
    config: OpenAIAnnotator,
    prompt: AnnotationPrompt,
    question: Question,
    refused: Collection[str] = (),
) -> dict[str, Any]:
    """The body of a request to /chat/completions.

    refused: optional parameters that the endpoint doesn't take: temperature; max_tokens, in whose
    place goes max_completion_tokens; response_format with a schema, in whose place goes json_object
    unless that is refused too.
    """
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    body: dict[str, Any] = {
        "model": config.model,
        "messages": question.messages,
        limit: question.max_new_tokens,
    }
    if "temperature" not in refused:
        body["temperature"] = config.temperature
    if config.structured and "response_format" not in refused:
        schema = {"name": "annotation", "schema": prompt.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif config.structured and "json_object" not in refused:
        body["response_format"] = {"type": "json_object"}
    return body


def question_key(config: OpenAIAnnotator, prompt: AnnotationPrompt, question: Question) -> str:
    """The journal's key of a question: the same for whatever way it is sent."""
    return request_key(
        config.base_url,
        config.model,
        question.messages,
        prompt.schema if config.structured else None,
        {"temperature": config.temperature, "max_new_tokens": question.max_new_tokens},
        prompt.version,
    )


def checked_body(content: bytes) -> dict[str, Any]:
    """The response's body as JSON, if it is a chat completion.

    Raises:
        NotACompletion: it is something else (HTML, half a body, no choices).
    """
    try:
        body = from_json(content)
        _Body.model_validate(body)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise endpoint.NotACompletion(f"{said} in {content[:_SHOWN_BYTES]!r}") from None
    except ValueError as error:  # not JSON
        raise endpoint.NotACompletion(f"{error} in {content[:_SHOWN_BYTES]!r}") from None
    return body


def read_record(record: dict[str, Any]) -> Answer:
    """The answer in a journalled record.

    record: "latency_s"; "body" as `checked_body` gives it; "batched" if a batch interface answered.
    """
    body = _Body.model_validate(record["body"])
    choice, tokens = body.choices[0], body.usage or _Usage()
    return Answer(
        choice.message.refusal or choice.message.content or "",
        cut=choice.finish_reason == "length",
        refused=choice.message.refusal is not None,
        prompt_tokens=tokens.prompt_tokens,
        completion_tokens=tokens.completion_tokens,
        latency_s=record["latency_s"],
        cached_tokens=tokens.cached_tokens,
        batched=record.get("batched", False),
    )
