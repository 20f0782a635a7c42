"""One sentence for a config that pydantic refuses: the field, the reason, the nearest known name.

settings.py and flows.py call `explain`; `unknown_name` serves every closed list of names.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .configs.endpoint import HOLDS_SECRET
from .errors import all_of, quoted, shortened

# Discriminators of unions.
TAGS = ("engine", "kind")
_OWN = "own"  # the tag in a location of a union's member whose own tag may be any text
_OWN_CODE = "file.py:Class of your own"
_MOST_LISTED = 40
_MOST_FAULTS = 10


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One sentence for all faults: which field, why, and what it could be.

    where: the file or "config"; model: the config's class, which names the known keys.
    """
    located = [(fault, *_located(model, fault["loc"])) for fault in error.errors()]
    # A union of plain types has a fault per type. The one deepest in the value says most.
    parents = {tuple(keys[:end]) for _, keys, *_ in located for end in range(len(keys))}
    first = {tuple(keys): one for one in reversed(located) if tuple(keys := one[1]) not in parents}
    shown = [one for one in located if first.get(tuple(one[1])) is one]
    brief = len(shown) > 1
    found = [_explained(*one, model, brief) for one in shown[:_MOST_FAULTS]]
    more = f" (and {len(shown) - len(found)} more)" if len(shown) > len(found) else ""
    return f"{where}: {all_of(found)}{more}"


def _explained(
    fault: Any,
    keys: Sequence[str],
    section: type[BaseModel],
    variants: Sequence[type[BaseModel]],
    model: type[BaseModel],
    brief: bool,
) -> str:
    """What one fault is; brief: a nearest key stands for the list of known ones."""
    field = shortened(".".join(keys))
    if fault["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_known_keys(model, keys, section, brief)}"
    if fault["type"] == "missing":
        tag, known = _tags_of(variants)
        set_as = f"{field}.{tag}=value, one of {known}" if known else f"{field}=value"
        return f"{field}: is required; set it in the file or as {set_as}"
    if fault["type"] == "union_tag_not_found":
        tag, known = _tags_of(variants)
        return (
            f"{field}: names no {tag}; set it in the file or as {field}.{tag}=value, one of {known}"
        )
    if fault["type"] == "union_tag_invalid":
        context = fault["ctx"]
        known = [name.strip("'") for name in context["expected_tags"].split(", ")]
        tag = context["discriminator"].strip("'")
        known += [_OWN_CODE] if any(not _tag_values(one) for one in variants) else []
        return f"{field}.{tag} {unknown_name(context['tag'], known)}"
    if fault["type"] == HOLDS_SECRET:
        return f"{field}: {fault['msg']}"
    if fault["input"] is None and keys:
        return f"{field}: has no value; set it in the file or as {field}=value"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{field}: must be a section of `key: value` lines (got {quoted(fault['input'])})"
    reason = shortened(fault["msg"].removeprefix("Value error, "))
    got = "" if isinstance(fault["input"], dict) else f" (got {quoted(fault['input'])})"
    return f"{field}: {reason}{got}" if field else reason


def unknown_name(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is none of a closed list."""
    names = list(known)
    near = get_close_matches(str(name)[:100], names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{quoted(name)}: is none of {', '.join(names[:_MOST_LISTED])}{hint}"


def _known_keys(
    model: type[BaseModel], keys: Sequence[str], section: type[BaseModel], brief: bool
) -> str:
    """The nearest key of the section, or the key's place elsewhere; and the section's keys.

    brief: these only if no key is near.
    """
    *parents, key = keys
    names = list(section.model_fields)
    near = get_close_matches(key[:100], names, 1)
    meant = [".".join([*parents, one]) for one in near]
    if not near:
        paths = {path for path in _paths(model) if path.rpartition(".")[2] == key}
        paths -= {".".join(keys)}  # a key of another member of the union
        meant = sorted(paths, key=lambda path: (path.count("."), path))[:3]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    tag = next(iter(_tag_fields(section)), None)
    if tag and ".".join(keys) in _paths(model):  # a key of another member of the union
        hint = f"it belongs to another {tag}; "
    if hint and brief:
        return hint.strip("; ")
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
        if not variants and get_origin(kind) in (Union, UnionType):  # of plain types: one's name
            kind = next((one for one in get_args(kind) if str(part) in str(one)), None)
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
        for tag in _tag_fields(model)
        for value in get_args(model.model_fields[tag].annotation)
        if get_origin(model.model_fields[tag].annotation) is Literal
    }


def _tag_fields(model: type[BaseModel]) -> list[str]:
    """The fields that tell a model from others of its union; a name tells it if it is fixed."""
    fields = model.model_fields
    named = "name" in fields and get_origin(fields["name"].annotation) is Literal
    return [tag for tag in TAGS if tag in fields] or ["name"] * named


def _tags_of(variants: Sequence[type[BaseModel]]) -> tuple[str, str]:
    """The name of a union's tag, and the values that it may have; empty: it has none."""
    values = [value for one in variants for value in sorted(_tag_values(one)) or [_OWN_CODE]]
    names = [tag for one in variants for tag in _tag_fields(one)]
    return (names[0], ", ".join(values)) if len(variants) > 1 and names else ("", "")


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all fields of a config."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in models_in(field.annotation):
            yield from _paths(child, f"{prefix}{name}.")
