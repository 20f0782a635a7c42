"""Numbers in environment variables, such as torchrun's RANK; ranks.py and pipelines/ read them here."""

import os

from .errors import InputError

_MOST = 1_000_000


def whole_number(variable: str, default: int) -> int:
    """The integer in an environment variable; `default` if it is unset.

    Raises:
        InputError: the value is no integer from 0 to a million.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= _MOST):
        raise InputError(
            f"environment variable {variable} is {text!r:.80}, no whole number; unset it, or start "
            "with torchrun, which sets it"
        )
    return int(text)
