"""A config of chosen fields as YAML, each with its description as a comment.

`trace-opd init` writes such a file. template.py writes one of all fields.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from .config_faults import models_in
from .template import chosen_variant, comment_lines, one_line_yaml, tag_of

_WIDTH = 92
_INDENT = "  "


@dataclass(frozen=True)
class Shared:
    """A section that several stages take: written once under a YAML anchor, then by its name."""

    anchor: str
    values: Mapping[str, Any]


def commented_yaml(model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """YAML of nested values in their order, with the descriptions of the model's fields."""
    return "\n".join([*_Writer().section(model, values, 0), ""])


def plain(values: Any) -> Any:
    """The same values without anchors, as they load from the YAML."""
    if isinstance(values, Shared):
        return plain(values.values)
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return values


class _Writer:
    def __init__(self) -> None:
        self._written: set[str] = set()

    def section(
        self, model: type[BaseModel], values: Mapping[str, Any], level: int
    ) -> Iterator[str]:
        for name, value in values.items():
            if level == 0:
                yield ""
            lines = self._field(model, name, value, level)
            yield from (f"{_INDENT * level}{line}" for line in lines)

    def _field(self, model: type[BaseModel], name: str, value: Any, level: int) -> Iterator[str]:
        field = model.model_fields[name]
        if isinstance(value, Shared) and value.anchor in self._written:
            yield f"{name}: *{value.anchor}"
            return
        if isinstance(value, Shared):
            self._written.add(value.anchor)
        inner = value.values if isinstance(value, Shared) else value
        anchor = f" &{value.anchor}" if isinstance(value, Shared) else ""
        variants = models_in(field.annotation)
        yield from comment_lines(field, plain(inner), bool(variants))
        if not (variants and isinstance(inner, Mapping)):
            yield f"{name}: {one_line_yaml(inner)}"
            return
        chosen = chosen_variant(variants, plain(inner))
        yield from _others(variants, chosen)
        yield f"{name}:{anchor}"
        yield from self.section(chosen, inner, 1)


def _others(variants: list[type[BaseModel]], chosen: type[BaseModel]) -> Iterator[str]:
    """Which other choices a section has."""
    names = [tag_of(one)[1] or "code of your own" for one in variants if one is not chosen]
    if names:
        text = f"Others: {', '.join(names)}; `trace-opd config pipeline` shows their fields."
        yield from (f"# {line}" for line in textwrap.wrap(text, _WIDTH))
