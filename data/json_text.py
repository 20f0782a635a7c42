"""JSON from files of others: what Python's reader lets pass and no table can hold is refused."""

import json
from typing import Any


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: its text says what is wrong: no JSON, nested too deep, a number of thousands of
            digits, half of a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value
