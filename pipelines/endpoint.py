"""What clients of an OpenAI-compatible endpoint share: keys, waits, and what errors mean."""

import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import openai
from tenacity import RetryCallState, wait_random_exponential

from ..schemas.errors import InputError

_MOST_CHARS = 300
_SCHEMA_REFUSED = re.compile(r"response_format|json_schema|structured output|grammar", re.I)
_UNSUPPORTED = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|not permitted", re.I)


_backoff = wait_random_exponential(multiplier=0.5, max=60)


class NotACompletion(Exception):
    """The endpoint said 200 and sent something else than a chat completion."""


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: rate limits, server errors, broken connections."""
    if isinstance(error, openai.APIStatusError):
        if is_quota(error):  # also a 429, but waiting doesn't fill the account
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | NotACompletion)


def is_quota(error: BaseException) -> bool:
    return isinstance(error, openai.APIStatusError) and "insufficient_quota" in (
        error.code,
        error.type,
    )


def condemns_all(error: BaseException) -> bool:
    """Whether every other request will meet the same error: key, model, address or account."""
    return is_quota(error) or isinstance(error, openai.AuthenticationError | openai.NotFoundError)


def overloaded(error: BaseException) -> bool:
    """Whether the endpoint asks for fewer requests."""
    return isinstance(error, openai.APIStatusError) and error.status_code in (429, 503)


def refused_parameter(error: openai.APIStatusError) -> str | None:
    """The optional parameter that the endpoint refuses, if that is what a 4xx says.

    Servers without structured output refuse response_format; some of OpenAI's models refuse
    max_tokens (they want max_completion_tokens) or another temperature than theirs.
    """
    said = f"{error.param or ''} {error.message}"
    if _SCHEMA_REFUSED.search(said):
        return "response_format"
    if _UNSUPPORTED.search(said):
        for name in ("max_tokens", "temperature"):
            if error.param == name or f"'{name}'" in said:
                return name
    return None


def retry_after_s(error: BaseException) -> float | None:
    """Seconds that the endpoint asks to wait, if it does."""
    if not isinstance(error, openai.APIStatusError):
        return None
    return seconds_asked(error.response.headers.get("retry-after", ""))


def seconds_asked(header: str) -> float | None:
    """The value of a Retry-After header: seconds or an HTTP date; None if it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    if until.tzinfo is None:  # an HTTP date is in GMT whether or not it says so
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def sentence(error: BaseException, key: str | None) -> str:
    """The error in one short line. Servers may echo the key: it never goes further than here."""
    said = " ".join(str(error).split())
    if key:
        said = said.replace(key, "***")
    return f"{type(error).__name__}: {said}"[:_MOST_CHARS]


def wait_s(state: RetryCallState) -> float:
    """Before the next attempt: what the server asks for (Retry-After), else a growing random time."""
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after_s(error) if error is not None else None
    return _backoff(state) if asked is None else asked


def read_key(variable: str | None, setting: str) -> str | None:
    """The API key in an environment variable; None if none is named.

    setting: the config key that names the variable, for the error.

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
