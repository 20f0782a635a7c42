"""A prompt in a file that a person can read and change. Annotation prompts and rubrics are such.

Markdown: a front matter that names the version, then sections. `{{name}}` is replaced in one pass,
so a text that is filled in can't bring placeholders of its own. Rollouts are untrusted: the tags
around each text carry a hash of the response, so it can't close them.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ...schemas.errors import InputError
from ...schemas.yaml_text import load_yaml

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Form:
    """What a prompt file holds.

    fields: by section the placeholders that it may use; needed: those that it must use; optional:
    sections without placeholders that may be missing; example: a version.
    """

    fields: Mapping[str, Collection[str]]
    needed: Mapping[str, Collection[str]]
    example: str
    optional: tuple[str, ...] = field(default=())


def parse_prompt(text: str, path: Path, form: Form) -> tuple[str, dict[str, str]]:
    """Version and sections of a prompt file.

    Raises:
        InputError: it has no version, lacks a section or a placeholder, or has an unknown one.
    """
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
            f"`version: {form.example}`, `---`"
        )
    names = "|".join((*form.fields, *form.optional))
    pieces = re.split(rf"^# ({names})[ \t]*$", match.group(2), flags=re.MULTILINE)
    sections = {
        name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }  # text before the first section is a comment
    if absent := [name for name in form.fields if not sections.get(name)]:
        raise InputError(f"{path}: section `# {absent[0]}` is missing or empty; add it")
    for name, allowed in form.fields.items():
        used = set(_PLACEHOLDER.findall(sections[name]))
        if unknown := sorted(used - set(allowed)):
            raise InputError(
                f"{path}: section {name} has the unknown placeholder {{{{{unknown[0]}}}}}; it may "
                f"use {', '.join(sorted(allowed))}"
            )
        if lacking := sorted(set(form.needed.get(name, ())) - used):
            raise InputError(f"{path}: section {name} lacks {{{{{lacking[0]}}}}}; add it")
    for name in form.optional:
        if _PLACEHOLDER.search(sections.get(name, "")):
            raise InputError(f"{path}: section {name} has a placeholder; it takes none")
    return str(header["version"]), sections


def fill(template: str, fields: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: fields[match.group(1)], template)


def fence(response: str) -> str:
    """The same for the same response, so that a repeated request is the same request."""
    return hashlib.sha256(response.encode()).hexdigest()[:12]
