"""Types of an endpoint's address and key.

Manifests, reports and logs contain configs, so neither may hold a secret, and errors do not quote
it.
"""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

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
