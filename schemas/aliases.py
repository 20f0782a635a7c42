"""Which names a dataset may have; configs and commands check them before any work."""

import re
from typing import Annotated

from pydantic import AfterValidator

from .errors import InputError, quoted

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RULE = "use letters, digits, dot, dash and underscore, and begin with a letter or digit"


def is_alias(text: str) -> bool:
    """Whether a text may be a dataset's name."""
    return _ALIAS.fullmatch(text) is not None


def require_alias(text: str | None) -> str | None:
    """The text. Raises InputError if it may not be a dataset's name; None stands for no name."""
    if text is not None and not is_alias(text):
        raise InputError(f"alias {quoted(text)}: {_RULE}")
    return text


def _checked(text: str) -> str:
    if not is_alias(text):
        raise ValueError(_RULE)
    return text


# A field of a config.
AliasName = Annotated[str, AfterValidator(_checked)]
