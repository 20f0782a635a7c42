"""The JSON object in a model's answer, read strictly. Annotators and judges call it.

Raw answers are journalled, so a change here bills nothing.
"""

import json
import re
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from .dialogue import Unusable

_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?\s*```\Z", re.DOTALL)
_END_OF_THINKING = "</think>"


def read_object(text: str, schema: dict[str, Any]) -> Any:
    """The value of an answer, valid by a schema. Nothing in it is guessed or repaired.

    Around the JSON object only thinking before it and one code fence are allowed.

    Raises:
        Unusable: it is no JSON, or another value; RecursionError: it is nested too deep.
    """
    body = text.rpartition(_END_OF_THINKING)[2].strip()
    if fenced := _FENCED.match(body):
        body = fenced.group(1)
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise Unusable(f"it is not one JSON object ({error})") from None
    fault = best_match(Draft202012Validator(schema).iter_errors(value))
    if fault is not None:
        raise Unusable(f"{fault.json_path.removeprefix('$.')}: {fault.message}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key appears twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
