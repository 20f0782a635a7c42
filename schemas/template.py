"""A config as a commented YAML template: `trace-opd config STAGE` prints it for a user to edit.

Every field has its description as a comment and its default as its value. A required field has no
value and is marked REQUIRED. A default that is not enough (both phases of a training have 0 steps)
has an example as its value, from pydantic's `examples`. The other members of a union, and optional
sections that are null, are commented out.
"""

import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from .config_faults import models_in

_WIDTH = 96
_INDENT = "  "
_NAME = "NAME"  # stands for a key that the user chooses
_UNSET: Any = object()


def template(model: type[BaseModel]) -> str:
    """The template of a config: YAML that loads once the required fields have values."""
    head = textwrap.wrap(" ".join((model.__doc__ or "").split()), _WIDTH)
    head += [
        "Give a value to each line that is marked REQUIRED. Drop lines whose default is right.",
        'A line "Or …" begins another choice for the section above it, to take its place.',
    ]
    lines = [*(f"# {line}" for line in head), *_Template().fields(model, {}, "")]
    return "\n".join([*lines, ""])


class _Template:
    """The lines of a config; each union's other members are written once."""

    def __init__(self) -> None:
        self._shown: dict[frozenset[type[BaseModel]], str] = {}

    def fields(self, model: type[BaseModel], values: dict[str, Any], path: str) -> Iterator[str]:
        """The lines of a model's fields, the tag first. values: nested, instead of defaults."""
        fields = model.model_fields.items()
        for name, field in sorted(fields, key=lambda item: len(_names(item[1].annotation)) != 1):
            value = values.get(name, _UNSET)
            default = _UNSET if field.is_required() else _default(field)
            if value is _UNSET:
                value = default
            if field.examples and value == default:
                value = field.examples[0]
            if not path:
                yield ""
            yield from self._field(name, field, value, f"{path}{name}")

    def _field(self, name: str, field: FieldInfo, value: Any, path: str) -> Iterator[str]:
        variants, named = models_in(field.annotation), _named_models(field.annotation)
        yield from comment_lines(field, value, bool(variants or named))
        if value is None and variants:
            yield f"{name}: null"
            yield from _commented_out(self._section(name, variants[0], {}, path))
        elif variants:
            chosen = chosen_variant(variants, value)
            given = value if isinstance(value, dict) else {}
            yield from self._section(name, chosen, given, path)
            yield from self._others(name, variants, chosen, path)
        elif named is not None:
            yield f"{name}:" if value is _UNSET else f"{name}: {one_line_yaml(value)}"
            entry = self._first_entry(named, path)
            yield from entry if value is _UNSET else _commented_out([f"{name}:", *entry])
        elif len(names := _names(field.annotation)) == 1:
            yield f"{name}: {names[0]}"
        else:
            yield f"{name}:" if value is _UNSET else f"{name}: {one_line_yaml(value)}"

    def _section(
        self, name: str, model: type[BaseModel], values: dict[str, Any], path: str
    ) -> Iterator[str]:
        yield f"{name}:"
        yield from _indented(self.fields(model, values, f"{path}."))

    def _others(
        self, name: str, variants: list[type[BaseModel]], chosen: type[BaseModel], path: str
    ) -> Iterator[str]:
        others = [one for one in variants if one is not chosen]
        if not others:
            return
        labels = [tag_of(one)[1] or "code of your own" for one in others]
        shown = self._shown.setdefault(frozenset(variants), path)
        if shown != path:
            yield f"# Or {', '.join(labels)}: as in {shown}."
            return
        for label, other in zip(labels, others, strict=True):
            yield f"# Or {label}:"
            yield from _commented_out(self._section(name, other, {}, path))

    def _first_entry(self, kind: Any, path: str) -> Iterator[str]:
        """A first entry of a dict of configs by names of the user's."""
        inner = _named_models(kind)
        if inner is None:
            lines = self.fields(models_in(kind)[0], {}, f"{path}.{_NAME}.")
        else:
            lines = self._first_entry(inner, f"{path}.{_NAME}")
        yield f"{_INDENT}# REQUIRED: a name of yours instead of {_NAME}; more may follow."
        yield f"{_INDENT}{_NAME}:"
        yield from _indented(lines, 1 if inner is not None else 2)


def comment_lines(field: FieldInfo, value: Any, nested: bool) -> list[str]:
    """The description, the names that the field takes, and whether it needs a value."""
    text = field.description or ""
    names = _names(field.annotation)
    if len(names) > 1 and not all(name in text for name in names):
        text += f" One of {', '.join(names)}."
    if value is _UNSET and not nested and len(names) != 1:
        text = f"REQUIRED. {text}"
    elif field.examples and not field.is_required() and not nested:
        text += f" Default: {one_line_yaml(_default(field))}."
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def chosen_variant(variants: list[type[BaseModel]], value: Any) -> type[BaseModel]:
    """The member of a union that a value names; else the first that needs a value of the user's."""
    if isinstance(value, dict):
        for variant in variants:
            tag, name = tag_of(variant)
            if name is not None and value.get(tag) == name:
                return variant
    return next((one for one in variants if _needs_values(one)), variants[0])


def _needs_values(model: type[BaseModel]) -> bool:
    fields = model.model_fields.values()
    return any(one.is_required() and not _names(one.annotation) for one in fields)


def tag_of(model: type[BaseModel]) -> tuple[str, str | None]:
    """Name and value of the field with a single possible value, such as `engine: rule`."""
    for name, field in model.model_fields.items():
        if len(names := _names(field.annotation)) == 1:
            return name, names[0]
    return "", None


def _names(kind: Any) -> list[str]:
    """The closed list of names that a Literal or an enumeration takes."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return TypeAdapter(kind).json_schema().get("enum", [])
    return []


def _named_models(kind: Any) -> Any:
    """The annotation of the values of a dict of configs; None for anything else."""
    if get_origin(kind) is not dict:
        return None
    inner = get_args(kind)[1]
    return inner if models_in(inner) or _named_models(inner) is not None else None


def _default(field: FieldInfo) -> Any:
    """A field's default as JSON data."""
    default = field.get_default(call_default_factory=True)
    return TypeAdapter(cast(Any, field.annotation)).dump_python(default, mode="json")


def one_line_yaml(value: Any) -> str:
    """A value on one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, allow_unicode=True, width=10**9
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _indented(lines: Iterable[str], levels: int = 1) -> Iterator[str]:
    return (f"{_INDENT * levels}{line}" if line else line for line in lines)


def _commented_out(lines: Iterable[str]) -> Iterator[str]:
    return (f"# {line}" for line in lines)
