"""What clients of an OpenAI-compatible endpoint share: keys, waits, and what errors mean.

Called by samplers and annotators; the connections themselves are in transport.py.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
import openai
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, wait_random_exponential

from ..schemas.errors import InputError
from .terminal import visible

_MOST_CHARS = 300
_LEAST_SECRET = 8  # characters; local servers take EMPTY or 1, which answers are full of
_SCHEMA_REFUSED = re.compile(r"response_format|json_schema|structured output|grammar", re.I)
_UNSUPPORTED = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|not permitted", re.I)
_NO_MONEY = {"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"}
# OpenAI's 429 for a request above the tokens per minute: waiting doesn't make it fit.
_TOO_LARGE = re.compile(r"request too large", re.I)
# The server was never reached, so nothing can have been billed.
_UNCONNECTED = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
_OVERLOADED = (503, 529)  # refused before any work; other server errors may follow a billed answer
# Counts are short: longer digits without a unit would be searched in quadratic time.
_RESET = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|d|h|m|s)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BY_STATUS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
_Body = TypeVar("_Body", bound=BaseModel)

_backoff = wait_random_exponential(multiplier=0.5, max=60)


class NotACompletion(openai.OpenAIError):  # the client lets its own kind of error pass unchanged
    """The endpoint's status is 200, and its body is of another kind, or too large."""


class Redirected(openai.OpenAIError):
    """The endpoint sends its clients to another address."""


FAILURES = (openai.APIError, NotACompletion, Redirected)


def status_error(response: httpx2.Response) -> openai.APIStatusError:
    """The OpenAI client's error of an answer that has a status of failure and was read."""
    body: object = response.text
    message = f"Error code: {response.status_code}"
    with suppress(ValueError, RecursionError):
        body = json.loads(response.text)
    if isinstance(body, dict):
        body = body.get("error", body)
        if isinstance(body, dict) and body.get("message") and isinstance(body["message"], str):
            message += f" - {body['message']}"
    kind = openai.InternalServerError if response.status_code >= 500 else openai.APIStatusError
    return _BY_STATUS.get(response.status_code, kind)(message, response=response, body=body)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: rate limits, server errors, broken connections."""
    if isinstance(error, openai.APIStatusError):
        # An empty account and a request above the limit are also a 429, but waiting mends neither.
        if is_quota(error) or _TOO_LARGE.search(error.message):
            return False
        return status_may_pass(error.status_code)
    return isinstance(error, openai.APIConnectionError | NotACompletion)


def status_may_pass(status: int) -> bool:
    """Whether a request that got this HTTP status may succeed later."""
    return status in (408, 409, 429) or status >= 500


def is_quota(error: BaseException) -> bool:
    """Whether the account is empty or closed: not a rate limit, though some servers send 429."""
    return isinstance(error, openai.APIStatusError) and (
        error.status_code == 402 or not _NO_MONEY.isdisjoint((str(error.code), str(error.type)))
    )


def condemns_all(error: BaseException) -> bool:
    """Whether every other request will meet the same error: key, model, address or account."""
    return is_quota(error) or isinstance(
        error, openai.AuthenticationError | openai.NotFoundError | Redirected
    )


def overloaded(error: BaseException) -> bool:
    """Whether the endpoint has more requests than it can serve: by its status, or too slow."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (429, *_OVERLOADED)
    return isinstance(error, openai.APITimeoutError)


def may_be_billed(error: BaseException) -> bool:
    """Whether the endpoint may have made an answer although no complete one arrived."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 and error.status_code not in _OVERLOADED
    if isinstance(error, Redirected):
        return False
    return type(error.__cause__).__name__ not in _UNCONNECTED


def failure_kind(error: BaseException) -> str:
    """Why a request has no answer, in a word or two for a count of them."""
    if isinstance(error, openai.APIStatusError):
        return status_kind(error.status_code)
    if isinstance(error, openai.APITimeoutError):
        return "timed out"
    if isinstance(error, NotACompletion):
        return "unparsable"
    if isinstance(error, Redirected):
        return "refused"
    return "disconnected" if may_be_billed(error) else "unreachable"


def status_kind(status: int) -> str:
    """As `failure_kind`, of an HTTP status."""
    if status in (408, 504):
        return "timed out"
    if status in (429, *_OVERLOADED):
        return "overloaded"
    return "server error" if status >= 500 else "refused"


def refused_parameter(error: openai.APIStatusError, refused: Collection[str] = ()) -> str | None:
    """The optional parameter that a 4xx refuses; None if it refuses something else.

    Servers without structured output refuse response_format, or know its json_object alone; some of
    OpenAI's models refuse max_tokens (for max_completion_tokens) or any temperature but their own.

    refused: the parameters that the request was already without.
    """
    text = f"{error.param or ''} {error.message}"
    if _SCHEMA_REFUSED.search(text):
        return "json_object" if "response_format" in refused else "response_format"
    if _UNSUPPORTED.search(text):
        for name in ("max_tokens", "temperature"):
            if error.param == name or f"'{name}'" in text:
                return name
    return None


def retry_after_s(error: BaseException) -> float | None:
    """Seconds that the endpoint asks to wait; None if it does not."""
    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:  # Azure's, finer than the other
        return milliseconds / 1000
    return seconds_asked(headers.get("retry-after", ""), headers.get("date", ""))


def refill_s(headers: Mapping[str, str], kind: str, amount: float) -> float:
    """Seconds until so many requests or tokens (`kind`) are allowed, by OpenAI's x-ratelimit
    headers.

    The limit refills evenly until the reset, when all of it is available.
    """
    remaining, limit = (
        _number(headers.get(f"x-ratelimit-{name}-{kind}", "")) for name in ("remaining", "limit")
    )
    if remaining is None or limit is None or amount <= remaining or limit <= remaining:
        return 0.0
    reset = headers.get(f"x-ratelimit-reset-{kind}", "")
    full_s = sum(
        float(count) * _UNIT_S[unit] for count, unit in _RESET.findall(reset[:_MOST_CHARS])
    )
    return full_s * min(1.0, (amount - remaining) / (limit - remaining))


def seconds_asked(header: str, sent: str = "") -> float | None:
    """Seconds in a Retry-After header, which is a number or an HTTP date; None if it is neither.

    sent: the response's Date, because our clock may differ from the server's, or jump.
    """
    seconds, until = _number(header), _http_date(header)
    if seconds is not None or until is None:
        return seconds
    now = _http_date(sent) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _http_date(header: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(header)
        # An HTTP date is in GMT whether or not it says so.
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):  # a year or a zone that Python's dates cannot hold
        return None


def _number(header: str) -> float | None:
    """A header's plain number of at most 15 digits, else None."""
    return float(header) if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", header) else None


def read_body(content: bytes, kind: type[_Body]) -> _Body:
    """A response's body as JSON of some kind.

    Raises:
        NotACompletion: it is no JSON, nested too deeply, or of another kind.
    """
    try:
        return kind.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        fault = str(error)
    raise NotACompletion(f"{fault} in {content[:_MOST_CHARS]!r}")


def without_key(content: bytes, key: str | None) -> bytes:
    """A response with *** where the server echoes the key, plain or in JSON's escapes."""
    if key is None or len(key) < _LEAST_SECRET:
        return content
    content = content.replace(key.encode(), b"***")
    if b"\\" in content:
        try:
            spelled = json.dumps(json.loads(content), ensure_ascii=False)
        except ValueError:
            return content
        if key in spelled:
            return spelled.replace(key, "***").encode()
    return content


def sentence(error: BaseException, key: str | None) -> str:
    """The error in one short line, without the key, which servers may echo."""
    text = visible(" ".join(str(error).split()))
    if key:
        text = text.replace(key, "***")
    return f"{type(error).__name__}: {text}"[:_MOST_CHARS]


def asked_s(state: RetryCallState) -> float | None:
    """Seconds that the server asks to wait after the last attempt; None if it does not."""
    error = state.outcome.exception() if state.outcome else None
    return None if error is None else retry_after_s(error)


def wait_s(state: RetryCallState) -> float:
    """Wait before the next attempt: what the server asks for, else a growing random time."""
    asked = asked_s(state)
    return _backoff(state) if asked is None else asked


def read_key(variable: str | None, setting: str) -> str | None:
    """The API key in an environment variable; None if none is named.

    setting: the config field that names the variable, for the error.

    Raises:
        InputError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise InputError(
            f"environment variable {variable} is not set; export the endpoint's API key in it, or "
            f"set {setting} to null for a server without keys"
        )
    return key
