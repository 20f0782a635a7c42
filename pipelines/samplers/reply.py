"""Strict reading of a server's chat completion: its token ids and log-probabilities are trained on.

Engine openai reads every response here. A body that is no chat completion may be a gateway's
temporary failure, and the request is retried. A completion with impossible values is from a broken
server or another model, and the stage stops: dropping the row would bias its group, and the
server's other rows are no more trustworthy.
"""

import math
from typing import Any

from pydantic import BaseModel, Field

from ...schemas.columns import MOST_LOGPROB, MOST_TOKEN_ID
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason
from ...trace.protocols import Completion
from ..endpoint import NotACompletion, read_body
from ..terminal import visible

# A response that does not end with its own end token (a content filter, say) is truncated.
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.LENGTH,
}
_SHOWN_CHARS = 60


class _Token(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: Any = None  # pydantic's str refuses half of a surrogate pair


class _Choice(BaseModel):
    message: _Message
    finish_reason: Any = None
    logprobs: _Logprobs | None = None
    token_ids: list[Any] | None = None


class _Body(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    prompt_token_ids: list[Any] | None = None


def read_completion(
    content: bytes,
    server: str,
    max_new_tokens: int,
    vocab_size: int | None = None,
    prompt_token_ids: list[int] | None = None,
) -> Completion:
    """The completion in a response's body; its text is the server's.

    vocab_size: of the model, with padding; None: unknown. prompt_token_ids: the expected ones, if
    the tokenizer is known here.

    Raises:
        NotACompletion: the body is something else.
        InputError: it is a completion with impossible values.
    """
    body = read_body(content, _Body)
    choice = body.choices[0]
    text = choice.message.content
    if text is not None and not isinstance(text, str):
        raise NotACompletion(f"content is no text but a {type(text).__name__}")
    # JSON may hold half of a surrogate pair, Arrow can't: it becomes U+FFFD.
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def refuse(what: str, value: Any) -> InputError:
        plain = value is None or isinstance(value, int | float | str)
        shown = repr(value) if plain else f"a {type(value).__name__}"
        return InputError(
            f"{server}: sends {what} ({visible(shown)[:_SHOWN_CHARS]}); see whether it serves the "
            "policy, and restart it or use another server"
        )

    if len(body.choices) > 1:
        raise refuse("more choices than the one that was asked for", len(body.choices))
    reason = choice.finish_reason
    if not isinstance(reason, str) or reason not in _REASONS:
        raise refuse(f"a finish_reason that is none of {', '.join(_REASONS)}", reason)
    ids, prompt_ids = choice.token_ids, body.prompt_token_ids
    most = MOST_TOKEN_ID if vocab_size is None else vocab_size - 1
    for name, some in (("token_ids", ids), ("prompt_token_ids", prompt_ids)):
        for token in some or ():
            if type(token) is not int or not 0 <= token <= most:
                raise refuse(f"{name} outside the vocabulary of 0 … {most}", token)
    if ids is not None and len(ids) > max_new_tokens:
        raise refuse(f"more tokens than max_tokens={max_new_tokens}", len(ids))
    if prompt_ids is not None and prompt_token_ids is not None and prompt_ids != prompt_token_ids:
        raise refuse(
            "other prompt_token_ids than the policy's chat template gives, as under another "
            "template "
            "or for a problem that spells control tokens",
            f"{len(prompt_ids)} tokens, not {len(prompt_token_ids)}",
        )
    logprobs = None
    if ids is not None and choice.logprobs is not None and choice.logprobs.content is not None:
        logprobs = [token.logprob for token in choice.logprobs.content]
        if len(logprobs) != len(ids):
            raise refuse(
                f"another number of log-probabilities than of its {len(ids)} tokens", len(logprobs)
            )
        for logprob in logprobs:
            if not (math.isfinite(logprob) and logprob <= MOST_LOGPROB):
                raise refuse("a log-probability that is not finite or above 0", logprob)
    return Completion(text, _REASONS[reason], ids, logprobs, prompt_ids)
