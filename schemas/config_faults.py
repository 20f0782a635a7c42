"""One sentence for a config that pydantic refuses: the field, the reason, the nearest known name.

settings.py and flows.py call `explain`; `unknown_name` serves every closed list of names.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .configs.endpoint import HOLDS_SECRET
from .errors import quoted, shortened

# Discriminators of unions.
TAGS = ("engine", "kind")
_OWN = "own"  # the tag in a location of a union's member whose own tag may be any text
_MOST_LISTED = 40


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One sentence for the first fault, with the number of others.

    where: the file or "config"; model: the config's class, which names the known keys.
    """
    first, *others = error.errors()
    keys, section, variants = _located(model, first["loc"])
    field = shortened(".".join(keys))
    if first["type"] == "extra_forbidden":
        what = f"{field}: unknown key; {_known_keys(model, keys, section)}"
    elif first["type"] == "missing":
        what = f"{field}: is required; set it in the file or as {field}=value"
    elif first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].strip("'")  # type: ignore[typeddict-item]
        what = f"{field}: names no {tag}; set it in the file or as {field}.{tag}=value"
    elif first["type"] == "union_tag_invalid":
        context: dict[str, Any] = first["ctx"]  # type: ignore[assignment]
        known = [name.strip("'") for name in context["expected_tags"].split(", ")]
        tag = context["discriminator"].strip("'")
        own = any(not _tag_values(one) for one in variants)
        known += ["file.py:Class of your own"] if own else []
        what = f"{field}.{tag} {unknown_name(context['tag'], known)}"
    elif first["type"] == HOLDS_SECRET:
        what = f"{field}: {first['msg']}"
    elif first["input"] is None and keys:
        what = f"{field}: has no value; set it in the file or as {field}=value"
    elif first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        what = f"{field}: must be a section of `key: value` lines (got {quoted(first['input'])})"
    else:
        reason = shortened(first["msg"].removeprefix("Value error, "))
        got = "" if isinstance(first["input"], dict) else f" (got {quoted(first['input'])})"
        what = f"{field}: {reason}{got}" if field else reason
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {what}{more}"


def unknown_name(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is none of a closed list."""
    names = list(known)
    near = get_close_matches(str(name)[:100], names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{quoted(name)}: is none of {', '.join(names[:_MOST_LISTED])}{hint}"


def _known_keys(model: type[BaseModel], keys: Sequence[str], section: type[BaseModel]) -> str:
    """The nearest key of the section, or the key's place elsewhere; and the section's keys."""
    *parents, key = keys
    names = list(section.model_fields)
    near = get_close_matches(key[:100], names, 1)
    meant = [".".join([*parents, one]) for one in near]
    if not near:
        paths = {path for path in _paths(model) if path.rpartition(".")[2] == key}
        paths -= {".".join(keys)}  # a key of another member of the union
        meant = sorted(paths, key=lambda path: (path.count("."), path))[:3]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    tag = next((tag for tag in TAGS if tag in section.model_fields), None)
    if tag and ".".join(keys) in _paths(model):  # a key of another member of the union
        hint = f"it belongs to another {tag}; "
    place = shortened(".".join(parents)) or "this config"
    if tags := _tag_values(section):
        place += f" of {' or '.join(sorted(tags))}"
    return f"{hint}known in {place}: {', '.join(names)}"


def _located(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[list[str], type[BaseModel], list[type[BaseModel]]]:
    """The keys of a location, the innermost section above its last key, and the models there.

    A location holds the tag of a union's member behind the union's field, which is no key.
    """
    keys: list[str] = []
    section, kind = model, model
    for part in loc:
        variants = models_in(kind)
        if len(variants) > 1 and (chosen := _chosen_by(part, variants)) is not None:
            kind = section = chosen
            continue
        if len(variants) > 1 and part == "":  # a union of unions
            continue
        keys.append(str(part))
        owner = variants[0] if len(variants) == 1 else None
        if owner is not None and part in owner.model_fields:
            section, kind = owner, owner.model_fields[str(part)].annotation
        elif owner is not None and get_origin(kind) not in (dict, list):
            section, kind = owner, None
        else:  # a key of a dict, an index of a list
            kind = (get_args(kind) or (None,))[-1]
    return keys, section, models_in(kind)


def _chosen_by(tag: object, variants: Sequence[type[BaseModel]]) -> type[BaseModel] | None:
    """The member of a union that a tag in a location names; None: it is a key or an index."""
    for variant in variants:
        if tag in _tag_values(variant):
            return variant
    free = [one for one in variants if not _tag_values(one)]
    return free[0] if free and tag == _OWN else None


def models_in(kind: Any) -> list[type[BaseModel]]:
    """The config classes of an annotation: of a class itself, or of an optional or a union.

    Those inside a dict or a list are none of them.
    """
    if isinstance(kind, type) and get_origin(kind) is None:
        return [kind] if issubclass(kind, BaseModel) else []
    if get_origin(kind) is Annotated:
        return models_in(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [one for part in get_args(kind) for one in models_in(part)]
    return []


def _tag_values(model: type[BaseModel]) -> set[str]:
    """The values of a model's tag, such as {"rule"}."""
    return {
        str(value)
        for tag in TAGS
        if tag in model.model_fields
        for value in get_args(model.model_fields[tag].annotation)
        if get_origin(model.model_fields[tag].annotation) is Literal
    }


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all fields of a config."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in models_in(field.annotation):
            yield from _paths(child, f"{prefix}{name}.")
