"""Types of an endpoint's address and key, and the settings of an endpoint that is paid.

Manifests, reports and logs contain configs, so neither may hold a secret, and errors do not quote
it.
"""

import re
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from .base import Config, operational

# settings.explain omits the value at fault from errors of this type.
HOLDS_SECRET = "holds_secret"  # noqa: S105 - the name of an error

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _plain_url(url: str) -> str:
    """Raises PydanticCustomError unless the URL has only scheme, host, port and path."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname
    except ValueError:  # brackets without an IPv6 address
        known = False
    if not known or "@" in parts.netloc or "?" in url or "#" in url:
        raise PydanticCustomError(
            HOLDS_SECRET,
            "must be http(s)://host:port/path, without user, password or query: it is recorded "
            "with each dataset; give the key by api_key_env",
        )
    return url


def _variable_name(name: str) -> str:
    """Raises PydanticCustomError unless this can be the name of an environment variable."""
    if not _VARIABLE.fullmatch(name):
        raise PydanticCustomError(
            HOLDS_SECRET,
            "must be the name of an environment variable that holds the key, such as "
            "OPENAI_API_KEY, not the key: it is recorded with each dataset",
        )
    return name


def _plain_urls(urls: str | list[str]) -> str | list[str]:
    if not urls:
        raise PydanticCustomError("no_server", "must name at least one server")
    for url in [urls] if isinstance(urls, str) else urls:
        _plain_url(url)
    return urls


EndpointUrl = Annotated[str, AfterValidator(_plain_url)]
# One validator for the union: pydantic would report an error for each of its types.
EndpointUrls = Annotated[str | list[str], AfterValidator(_plain_urls)]
KeyVariable = Annotated[str, AfterValidator(_variable_name)]


class PaidEndpoint(Config):
    """An OpenAI-compatible endpoint whose answers are paid for, journalled and budgeted.

    role: what the settings' section is called in messages.
    """

    role: ClassVar[str]

    base_url: EndpointUrl = Field(default="https://api.openai.com/v1", description="Endpoint.")
    model: str = Field(description="Model name at the endpoint.")
    api_key_env: KeyVariable | None = Field(
        default="OPENAI_API_KEY",
        description="Environment variable that holds the key; null: no key.",
    )
    structured: bool = Field(default=True, description="Ask for the JSON schema (response_format).")
    prices: str | None = operational(
        None, "File of prices by host and model, which precedes the shipped prices.yaml."
    )
    usd_per_million_prompt_tokens: float | None = operational(
        None, "Price, which precedes any file's; 0 for a server without a bill.", ge=0
    )
    usd_per_million_completion_tokens: float | None = operational(
        None, "Price. Without one cost_usd is null: unknown.", ge=0
    )
    budget_usd: float | None = operational(
        None,
        "Most that the dataset may cost over all its runs; each request reserves its worst case "
        "before it is sent. Needs a known price.",
        ge=0,
    )
    concurrency: int = operational(16, "Most requests in flight.", ge=1)
    requests_per_minute: float | None = operational(None, "Request pace; null: no limit.", gt=0)
    tokens_per_minute: float | None = operational(
        None, "Pace of prompt and completion tokens together; null: no limit.", gt=0
    )
    timeout_s: float = operational(120.0, "Seconds before a request is given up.", gt=0)
    patience_s: float = operational(
        900.0,
        "Seconds without any answer, or of waits that a server asks for, before the stage stops.",
        gt=0,
    )
    max_attempts: int = operational(6, "Attempts per request, the first included.", ge=1)
