"""The annotation prompt: loaded from files that a person can read and change, filled per rollout.

Called by the engines that ask a model, and by the estimate. A prompt file (paid/prompt_file.py) has
the sections `# system`, `# user` and `# correction`. A section `# reflection` takes the place of
`{{reflection}}` where a corrective idea is asked for.

Rollouts are untrusted. A segment's number is at the start of a line and the other lines of a
segment are indented, so a response can't forge a segment, nor a problem that is a conversation a
turn.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.configs import AnnotatorPrompt
from ...schemas.conversation import shown_row
from ...schemas.errors import InputError
from ...schemas.labels import WORDS, SpanKind, TypeLabel, words_sha256
from ...schemas.text_files import read_text_file
from ..paid.prompt_file import Form, fence, fill, parse_prompt
from ..paid.questions import Messages
from .answer_schema import REFLECTION, labels_of, parse_schema, schema_about
from .rows import Item

PROMPTS = Path(__file__).parent / "prompts"
SHIPPED_PROMPT = PROMPTS / "annotate-v1.md"
SHIPPED_PROMPT_V2 = PROMPTS / "annotate-v2.md"  # for error types and reflections
SHIPPED_SCHEMA = PROMPTS / "answer.schema.json"
_FIELDS = {
    "system": {"types", REFLECTION},  # the same for all rollouts, so endpoints cache it
    "user": {
        "problem", "reference", "segments", "verdict", "kind", "last_segment", "types", "fence",
    },
    "correction": {"error", "last_segment", "types"},
}  # fmt: skip
_NEEDED = {"user": {"problem", "segments"}, "correction": {"error"}}
_FORM = Form(_FIELDS, _NEEDED, "my-prompt-v1", (REFLECTION,))
_INDENT = "    "


@dataclass(frozen=True)
class AnnotationPrompt:
    """A prompt file and an answer schema, checked.

    sections: template by section name. schemas, types: by the kind of span that is asked for, an
    answer's schema and the labels that it allows. reflection: whether wrong responses get a
    corrective idea. sha256: hashes of both files, and of the labels' words where the annotator
    reads them, which a dataset id hashes in place of paths.
    """

    version: str
    sections: dict[str, str]
    schemas: dict[SpanKind, dict[str, Any]]
    types: dict[SpanKind, tuple[TypeLabel, ...]]
    error_types: bool
    reflection: bool
    sha256: dict[str, str]


def prompt_of(config: AnnotatorPrompt) -> AnnotationPrompt:
    """`load_prompt` of an annotator's config."""
    return load_prompt(config.prompt, config.answer_schema, config.error_types, config.reflection)


def load_prompt(
    prompt: str | None = None,
    answer_schema: str | None = None,
    error_types: bool = False,
    reflection: bool = False,
) -> AnnotationPrompt:
    """Read a prompt file and an answer schema; None means the shipped ones.

    error_types: ask for labels of ErrorType about wrong responses, and state each label's words.
    reflection: ask for a corrective idea about wrong responses.

    Raises:
        InputError: a file is missing or has another content, or does not ask for what it should.
    """
    shipped = SHIPPED_PROMPT_V2 if error_types or reflection else SHIPPED_PROMPT
    prompt_path = Path(prompt) if prompt is not None else shipped
    schema_path = Path(answer_schema) if answer_schema is not None else SHIPPED_SCHEMA
    advice = (
        "give the path of a prompt or answer-schema file, or leave annotator.prompt and "
        "annotator.answer_schema out for the shipped ones"
    )
    prompt_text, schema_text = (read_text_file(file, advice) for file in (prompt_path, schema_path))
    version, sections = parse_prompt(prompt_text, prompt_path, _FORM)
    idea = sections.pop(REFLECTION, "")
    sections["system"] = _with_reflection(sections["system"], idea if reflection else "")
    if reflection and REFLECTION not in sections["system"]:
        raise InputError(
            f"{prompt_path}: never asks for a reflection; begin with a copy of the shipped "
            f"{SHIPPED_PROMPT_V2.name}, or set annotator.reflection=false"
        )
    schema = parse_schema(schema_text, schema_path)
    types = labels_of(schema, error_types, schema_path if answer_schema is not None else None)
    if reflection and answer_schema is not None and REFLECTION not in schema["properties"]:
        raise InputError(
            f"{schema_path}: has no property reflection; add one that may be a string or null, or "
            "set annotator.reflection=false"
        )
    hashes = {
        "prompt": hashlib.sha256(prompt_text.encode()).hexdigest(),
        "answer_schema": hashlib.sha256(schema_text.encode()).hexdigest(),
    }
    return AnnotationPrompt(
        version,
        sections,
        {kind: schema_about(kind, schema, types[kind], reflection) for kind in SpanKind},
        types,
        error_types,
        reflection,
        hashes | ({"words": words_sha256()} if error_types else {}),
    )


def ask(prompt: AnnotationPrompt, item: Item) -> Messages:
    """The conversation that asks for one rollout's annotation."""
    fields = _fields(prompt, item)
    # The same for all rollouts: the types of both kinds.
    for_all = {"types": _listed(prompt)}
    return [
        {"role": "system", "content": fill(prompt.sections["system"], for_all)},
        {"role": "user", "content": fill(prompt.sections["user"], fields)},
    ]


def correct(prompt: AnnotationPrompt, item: Item, answer: str, error: str) -> Messages:
    """The next messages after an answer that can't be used."""
    fields = _fields(prompt, item) | {"error": error}
    return [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": fill(prompt.sections["correction"], fields)},
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
        "problem": shown_row(problem),
        "reference": reference,
        "segments": numbered(item),
        "verdict": "right" if item.correct else "wrong",
        "kind": item.kind.value,
        "last_segment": str(len(item.segments) - 1),
        "types": ", ".join(prompt.types[item.kind]),
        "fence": fence(item.response),
    }


def _listed(prompt: AnnotationPrompt) -> str:
    """The labels in the instructions; those of both kinds with their words if they differ."""
    if not prompt.error_types:
        return ", ".join(prompt.types[SpanKind.KEY])
    lines = []
    for kind, verdict in ((SpanKind.KEY, "right"), (SpanKind.ERROR, "wrong")):
        lines.append(f"The response is {verdict}, for its {kind.value} segments:")
        lines += [f"- {label}: {WORDS[label]}" for label in prompt.types[kind]]
    return "\n".join(lines)


def _with_reflection(system: str, idea: str) -> str:
    """The instructions with the section on reflections in its place, or without it."""
    placeholder = f"{{{{{REFLECTION}}}}}"
    paragraphs = [text for text in system.split("\n\n") if idea or text.strip() != placeholder]
    return "\n\n".join(paragraphs).replace(placeholder, idea)
