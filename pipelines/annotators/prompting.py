"""The annotation prompt: loaded from files that a person can read and change, filled per rollout.

Called by the engines that ask a model, and by the estimate. A prompt file is Markdown with a front
matter that names its version and the sections `# system`, `# user` and `# correction`. `{{name}}`
is replaced in one pass, so a text that is filled in can't bring placeholders of its own.

Rollouts are untrusted. A segment's number is at the start of a line and the other lines of a
segment are indented, so a response can't forge a segment; the tags around each text carry a hash of
the response, so it can't close them.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ...data.input_files import read_json
from ...schemas.errors import InputError
from ...schemas.labels import DiagnosticType
from ...schemas.text_files import read_text_file
from ...schemas.yaml_text import load_yaml
from .rows import Item

PROMPTS = Path(__file__).parent / "prompts"
SHIPPED_PROMPT = PROMPTS / "annotate-v1.md"
SHIPPED_SCHEMA = PROMPTS / "answer.schema.json"
SECTIONS = ("system", "user", "correction")

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
_SECTION = re.compile(rf"^# ({'|'.join(SECTIONS)})[ \t]*$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_FIELDS = {
    "system": {"types"},  # the same for all rollouts: endpoints cache a common beginning
    "user": {
        "problem", "reference", "segments", "verdict", "kind", "last_segment", "types", "fence",
    },
    "correction": {"error", "last_segment", "types"},
}  # fmt: skip
_NEEDED = {"system": set(), "user": {"problem", "segments"}, "correction": {"error"}}
_INDENT = "    "

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class AnnotationPrompt:
    """A prompt file and an answer schema, checked.

    sections: template by section name. types: the labels that the schema allows. sha256: hashes of
    both files, which a dataset id hashes in place of their paths.
    """

    version: str
    sections: dict[str, str]
    schema: dict[str, Any]
    types: tuple[DiagnosticType, ...]
    sha256: dict[str, str]


def load_prompt(prompt: str | None = None, answer_schema: str | None = None) -> AnnotationPrompt:
    """Read a prompt file and an answer schema; None means the shipped ones.

    Raises:
        InputError: a file is missing or has another content.
    """
    prompt_path = Path(prompt) if prompt is not None else SHIPPED_PROMPT
    schema_path = Path(answer_schema) if answer_schema is not None else SHIPPED_SCHEMA
    advice = (
        "give the path of a prompt or answer-schema file, or leave annotator.prompt and "
        "annotator.answer_schema out for the shipped ones"
    )
    prompt_text, schema_text = (read_text_file(file, advice) for file in (prompt_path, schema_path))
    version, sections = _parse_prompt(prompt_text, prompt_path)
    schema = _parse_schema(schema_text, schema_path)
    return AnnotationPrompt(
        version,
        sections,
        schema,
        tuple(DiagnosticType(label) for label in schema["properties"]["type"]["enum"]),
        {
            "prompt": hashlib.sha256(prompt_text.encode()).hexdigest(),
            "answer_schema": hashlib.sha256(schema_text.encode()).hexdigest(),
        },
    )


def ask(prompt: AnnotationPrompt, item: Item) -> Messages:
    """The conversation that asks for one rollout's annotation."""
    fields = _fields(prompt, item)
    return [
        {"role": "system", "content": _fill(prompt.sections["system"], fields)},
        {"role": "user", "content": _fill(prompt.sections["user"], fields)},
    ]


def correct(prompt: AnnotationPrompt, item: Item, answer: str, error: str) -> Messages:
    """The next messages after an answer that can't be used."""
    fields = _fields(prompt, item) | {"error": error}
    return [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": _fill(prompt.sections["correction"], fields)},
    ]


def numbered(item: Item) -> str:
    """The response with a number before each segment and the rest of a segment indented."""
    lines = []
    for index, (start, end) in enumerate(item.segments):
        first, *rest = item.response[start:end].strip().splitlines() or [""]
        lines.append(f"[{index}] {first}")
        lines += [_INDENT + line for line in rest]
    return "\n".join(lines)


def _fields(prompt: AnnotationPrompt, item: Item) -> dict[str, str]:
    problem = item.problem
    reference = f"Final answer: {problem['answer']}"
    if problem["solution"]:
        reference += f"\nSolution:\n{problem['solution']}"
    return {
        "problem": problem["problem"],
        "reference": reference,
        "segments": numbered(item),
        "verdict": "right" if item.correct else "wrong",
        "kind": item.kind.value,
        "last_segment": str(len(item.segments) - 1),
        "types": ", ".join(prompt.types),
        # The same for the same response, so that a repeated request is the same request.
        "fence": hashlib.sha256(item.response.encode()).hexdigest()[:12],
    }


def _fill(template: str, fields: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: fields[match.group(1)], template)


def _parse_prompt(text: str, path: Path) -> tuple[str, dict[str, str]]:
    """Version and sections of a prompt file."""
    match = _FRONT_MATTER.match(text)
    try:
        header = load_yaml(match.group(1)) if match else None
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: front matter is not YAML ({' '.join(str(error).split())})"
        ) from None
    if match is None or not isinstance(header, dict) or not header.get("version"):
        raise InputError(
            f"{path}: has no front matter with a version; begin the file with the lines `---`, "
            "`version: my-prompt-v1`, `---`"
        )
    pieces = _SECTION.split(match.group(2))
    sections = {
        name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }  # text before the first section is a comment
    if absent := [name for name in SECTIONS if not sections.get(name)]:
        raise InputError(f"{path}: section `# {absent[0]}` is missing or empty; add it")
    for name in SECTIONS:
        used = set(_PLACEHOLDER.findall(sections[name]))
        if unknown := sorted(used - _FIELDS[name]):
            raise InputError(
                f"{path}: section {name} has the unknown placeholder {{{{{unknown[0]}}}}}; it may "
                f"use {', '.join(sorted(_FIELDS[name]))}"
            )
        if lacking := sorted(_NEEDED[name] - used):
            raise InputError(f"{path}: section {name} lacks {{{{{lacking[0]}}}}}; add it")
    return str(header["version"]), sections


def _parse_schema(text: str, path: Path) -> dict[str, Any]:
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
    if unknown := [label for label in labels if label not in list(DiagnosticType)]:
        raise InputError(
            f"{path}: type {unknown[0]!r} is no diagnostic type; use some of "
            f"{', '.join(DiagnosticType)}"
        )
    return schema


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
