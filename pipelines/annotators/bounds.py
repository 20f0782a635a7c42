"""The answer's JSON schema made finite, so that constrained decoding ends with any model.

A small model repeats digits, spans or words until its token limit if the schema lets it. So
everything has a bound, and the longest answer fits the limit even if each byte takes a token.
Called by the engine `self`.
"""

import json
from typing import Any

from jsonschema import Draft202012Validator

from ...schemas.errors import InputError
from ...schemas.labels import SpanKind
from .answer_schema import REFLECTION
from .prompting import AnnotationPrompt

_MOST_STRING_BYTES_PER_CHAR = 6  # \u001f; UTF-8 takes up to four
_END_TOKEN = 1
# A reflection, structured: printable ASCII, none of which JSON escapes, from a letter on.
_IDEA_CHARS = 240
_IDEA = rf"^[A-Za-z][ !#-\[\]-~]{{0,{_IDEA_CHARS - 1}}}$"
_NEEDED = ("abstain", "spans", "segments", "type")


def bounded_schema(
    prompt: AnnotationPrompt,
    segments: int,
    most_spans: int,
    max_new_tokens: int,
    kind: SpanKind = SpanKind.ERROR,
) -> dict[str, Any]:
    """The answer schema for a response of so many segments, which allows valid answers alone.

    kind: of the spans that are asked for; with reflections, an error's is written in plain ASCII
    without quotes and backslashes, where each character takes one byte.

    Spans name existing segments, each at most a quarter of them, without a quote: a quote checks
    freely chosen numbers, and a wrong one would void the answer. An answer that abstains marks
    nothing.

    Raises:
        InputError: the limit is below the longest answer with one span of one segment; the user's
            schema has a property without a bound.
    """
    asked = prompt.schemas[kind]
    if prompt.reflection and kind is SpanKind.ERROR:
        idea = {"type": "string", "pattern": _IDEA}
        asked = asked | {"properties": asked["properties"] | {REFLECTION: idea}}
    each_span = asked["properties"]["spans"]["items"]["properties"]["segments"]
    named = min(max(segments // 4, 1), each_span.get("maxItems", segments))
    sizes = [(s, n) for s in range(min(most_spans, segments), 0, -1) for n in range(named, 0, -1)]
    for spans, each in sizes or [(0, 0)]:
        schema = _answer(asked, segments, spans, each)
        needed = most_bytes(schema, "annotator.answer_schema") + _END_TOKEN
        if needed <= max_new_tokens:
            return schema
    raise InputError(
        f"annotator.max_new_tokens={max_new_tokens}: a structured answer may take {needed}; raise "
        "it to at least that"
    )


def most_bytes(schema: dict[str, Any], where: str) -> int:
    """Length of the longest JSON text that a schema allows, written as `json.dumps` writes it.

    where: what the schema describes, for the error.

    Raises:
        InputError: no bound, or an unknown keyword.
    """
    match schema:
        case {"enum": values}:
            return max(len(json.dumps(value)) for value in values)
        case {"const": value}:
            return len(json.dumps(value))
        case {"anyOf": choices}:
            return max(most_bytes(choice, where) for choice in choices)
        case {"type": list(kinds)}:
            return max(most_bytes(schema | {"type": kind}, where) for kind in kinds)
        case {"type": "object", "properties": properties, "additionalProperties": False}:
            pairs = [
                len(json.dumps(name)) + len(": ") + most_bytes(child, f"{where}.{name}")
                for name, child in properties.items()
            ]
            return len("{}") + sum(pairs) + len(", ") * max(len(pairs) - 1, 0)
        case {"type": "array", "maxItems": 0}:
            return len("[]")
        case {"type": "array", "maxItems": count, "items": child}:
            each = most_bytes(child, f"{where}.items")
            return len("[]") + count * each + len(", ") * (count - 1)
        case {"type": "string", "pattern": pattern} if pattern == _IDEA:
            return len('""') + _IDEA_CHARS
        case {"type": "string", "maxLength": length}:
            return len('""') + _MOST_STRING_BYTES_PER_CHAR * length
        case {"type": "integer", "minimum": least, "maximum": most}:
            return max(len(str(least)), len(str(most)))
        case {"type": "boolean"}:
            return len("false")
        case {"type": "null"}:
            return len("null")
    raise InputError(
        f"{where}: has no bound that constrained decoding could keep to; give strings maxLength, "
        "arrays maxItems, integers minimum and maximum, objects additionalProperties=false, or set "
        "annotator.structured=false"
    )


def _answer(schema: dict[str, Any], segments: int, spans: int, named: int) -> dict[str, Any]:
    """The answer's object; properties keep the schema's order, which is the prompt's."""
    marks = schema["properties"]["spans"]
    index = {"type": "integer", "minimum": 0, "maximum": segments - 1}
    chosen: dict[str, Any] = {
        "segments": {"type": "array", "minItems": 1, "maxItems": named, "items": index}
    }
    if Draft202012Validator(marks["items"]["properties"].get("quote", {})).is_valid(None):
        chosen["quote"] = {"type": "null"}
    span = _object(marks["items"], chosen)
    fewest = min(marks.get("minItems", 0), spans)
    some = {"type": "array", "minItems": fewest, "maxItems": spans, "items": span}
    if "abstain" not in schema["properties"]:
        return _object(schema, {"spans": some})
    none: dict[str, Any] = {"abstain": {"const": True}, "spans": {"type": "array", "maxItems": 0}}
    if schema["properties"].get(REFLECTION, {}).get("pattern") == _IDEA:
        none[REFLECTION] = {"type": "null"}
    return {
        "anyOf": [
            _object(schema, {"abstain": {"const": False}, "spans": some}),
            _object(schema, none),
        ]
    }


def _object(schema: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """An object of the properties that an answer needs or the schema requires."""
    needed = {*_NEEDED, *schema.get("required", [])}
    properties = {
        name: chosen.get(name, child)
        for name, child in schema["properties"].items()
        if name in needed
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
