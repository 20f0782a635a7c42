"""The JSON schema of an annotator's answer: read from a file, fitted to what is asked for.

Called by prompting.py. bounds.py makes it finite for constrained decoding.
"""

from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ...data.input_files import read_json
from ...schemas.errors import InputError
from ...schemas.labels import TYPE_LABELS, SpanKind, TypeLabel, type_label, types_of

REFLECTION = "reflection"  # the answer's property, and the prompt's section and placeholder
MOST_REFLECTION_CHARS = 600


def parse_schema(text: str, path: Path) -> dict[str, Any]:
    """An answer schema with what an annotation needs: spans and one known type."""
    try:
        schema = read_json(text)
        Draft202012Validator.check_schema(schema)
        _check_references(schema)
    except SchemaError as error:
        raise InputError(f"{path}: is not a JSON schema ({error.message})") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deep; write a flat schema") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    try:
        properties = schema["properties"]
        labels = properties["type"]["enum"]
        properties["spans"]["items"]["properties"]["segments"]
    except (KeyError, TypeError):
        labels = []
    if not labels or not isinstance(labels, list):
        raise InputError(
            f"{path}: must describe an object with the properties spans, an array of objects that "
            "have segments, and type, which has an enum; start from the shipped answer.schema.json"
        )
    if unknown := [label for label in labels if label not in TYPE_LABELS]:
        raise InputError(
            f"{path}: type {unknown[0]!r} is no diagnostic type; use some of "
            f"{', '.join(TYPE_LABELS)}"
        )
    return schema


def labels_of(
    schema: dict[str, Any], error_types: bool, path: Path | None
) -> dict[SpanKind, tuple[TypeLabel, ...]]:
    """The labels that an answer may give, by the kind of span that is asked for.

    error_types: whether errors have labels of their own. path: of a schema that is the user's,
    which may have fewer labels; None: the shipped one.

    Raises:
        InputError: the schema has no label for a kind, or one that no kind may have.
    """
    found = TYPE_LABELS if path is None else [type_label(x) for x in _enum(schema)]
    known = {kind: types_of(kind, error_types) for kind in SpanKind}
    for label in found if path is not None else ():
        if not any(label in labels for labels in known.values()):
            raise InputError(
                f"{path}: type {label} names a mistake; set annotator.error_types=true, or use "
                f"some of {', '.join(known[SpanKind.ERROR])}"
            )
    fitting = {kind: tuple(x for x in found if x in labels) for kind, labels in known.items()}
    for kind, labels in fitting.items():
        if not labels:
            raise InputError(
                f"{path}: annotator.error_types is true, and the schema's enum of type has no "
                f"label for {kind.value} segments; add some of {', '.join(known[kind])}"
            )
    return fitting


def schema_about(
    kind: SpanKind, schema: dict[str, Any], types: tuple[TypeLabel, ...], reflection: bool
) -> dict[str, Any]:
    """The schema of answers about one kind of span; only wrong responses have a reflection."""
    properties = dict(schema["properties"])
    if (allowed := [str(label) for label in types]) != _enum(schema):
        properties["type"] = properties["type"] | {"enum": allowed}
    if not reflection:
        return schema | {"properties": properties}
    idea = properties.get(REFLECTION, {"type": ["string", "null"]})
    properties[REFLECTION] = idea if kind is SpanKind.ERROR else {"type": "null"}
    required = dict.fromkeys([*schema.get("required", []), REFLECTION])
    return schema | {"properties": properties, "required": list(required)}


def _enum(schema: dict[str, Any]) -> list[str]:
    return schema["properties"]["type"]["enum"]


def _check_references(schema: Any) -> None:
    """Raises SchemaError at a reference to anything but a part of the schema: none is fetched."""
    resource = DRAFT202012.create_resource(schema)
    resolver = Registry().with_resource("", resource).resolver()
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for key in ("$dynamicRef", "$dynamicAnchor", "$anchor", "$id"):
                if key in part and (key != "$id" or part is not schema):
                    raise SchemaError(f"{key} is not supported; refer to parts by #/$defs/name")
            if isinstance(target := part.get("$ref"), str):
                try:
                    found = resolver.lookup(target).contents if target.startswith("#") else None
                except Unresolvable:
                    found = None
                if not isinstance(found, dict | bool):
                    raise SchemaError(
                        f"$ref {target!r} names no part of the schema, such as #/$defs/name"
                    )
            parts += part.values()
        elif isinstance(part, list):
            parts += part
