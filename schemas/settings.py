"""Configs from YAML files with presets and `key=value` overrides, and back to YAML.

The command line, the flows and `trace_opd.run` call `load_config`.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .config_faults import TAGS, explain
from .configs import PipelineConfig
from .errors import InputError, quoted, shortened
from .presets import preset_data
from .text_files import read_text_file
from .yaml_text import load_yaml

C = TypeVar("C", bound=BaseModel)

_PIPELINE_SECTIONS = {
    name for name, field in PipelineConfig.model_fields.items() if field.is_required()
}

_MOST_LEVELS = 64


def load_config(
    model: type[C],
    path: str | Path | Mapping[str, Any] | None,
    overrides: list[str] | None = None,
    section: str | None = None,
    preset: str | None = None,
) -> C:
    """Read a YAML file (or nothing), apply a preset, then `a.b=value` overrides, and validate.

    path: of the file; a mapping stands for its content. section: the stage whose section is taken
    if the file is a pipeline's (known by its required sections); empty if the section is missing.
    Values of overrides are YAML: `3`, `true`, `null`, `[1, 2]`.

    Raises:
        InputError: unreadable file, unknown preset, malformed override, unknown key or bad value.
    """
    data: Any = {}
    where = "config" if path is None or isinstance(path, Mapping) else str(path)
    if isinstance(path, Mapping):
        data = deepcopy(dict(path))
    elif path is not None:
        text = read_text_file(path, "give the path of a YAML config")
        try:
            data = load_yaml(text) or {}
        except yaml.YAMLError as error:
            raise InputError(f"{path}: is not YAML ({shortened(error)})") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: holds no mapping; write `key: value` lines")
    if section and data.keys() >= _PIPELINE_SECTIONS:
        data = data.get(section) or {}
        if not isinstance(data, dict):
            raise InputError(f"{where}: {section} holds no mapping; write `key: value` lines")
    if preset is not None:
        data = _laid_over(data, preset_data(preset, model, data))
    return validated(model, data, overrides or [], where)


def override(config: C, overrides: list[str] | None) -> C:
    """A config with `a.b=value` overrides applied.

    Raises:
        InputError: malformed override, unknown key or bad value.
    """
    data = config.model_dump(mode="json")
    return validated(type(config), data, overrides or [])


def overlaid(config: C, data: dict[str, Any], overrides: list[str]) -> C:
    """A config with nested data merged over it, then `a.b=value` overrides.

    Raises:
        InputError: malformed override, unknown key or bad value.
    """
    base = config.model_dump(mode="json")
    return validated(type(config), _laid_over(base, data), overrides)


def _laid_over(base: Any, top: dict[str, Any]) -> dict[str, Any]:
    """`top` merged over `base`, mapping by mapping; neither is changed."""
    out = dict(base) if isinstance(base, dict) else {}
    for key, value in top.items():
        out[key] = _laid_over(out.get(key), value) if isinstance(value, dict) else value
    return out


def validated(
    model: type[C], data: dict[str, Any], overrides: list[str], where: str = "config"
) -> C:
    """A config of nested data, to which `a.b=value` overrides are applied in place.

    where: what a sentence about a fault begins with.

    Raises:
        InputError: malformed override, unknown key or bad value.
    """
    for text in overrides:
        _apply(data, text)
    _fill_tags(data, model)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, where, model)) from None


def dump_config(config: BaseModel) -> str:
    """The complete config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _fill_tags(data: dict, model: type[BaseModel]) -> None:
    """Add the default engine's tag to a mapping that sets its fields without naming it."""
    for name, field in model.model_fields.items():
        child, default = data.get(name), field.default
        kind = type(default) if isinstance(default, BaseModel) else field.annotation
        if not isinstance(child, dict) or not isinstance(kind, type):
            continue
        if issubclass(kind, BaseModel):
            for tag in TAGS:
                if tag in kind.model_fields and hasattr(default, tag):
                    child.setdefault(tag, getattr(default, tag))
            _fill_tags(child, kind)


def _apply(data: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    shown = quoted(override, 300)
    if not equals or not key:
        raise InputError(f"override {shown}: write it as key=value, e.g. sampling.top_k=20")
    *parents, leaf = key.split(".")
    if len(parents) > _MOST_LEVELS:
        raise InputError(f"override {shown}: names {len(parents):,} levels; no config has so many")
    node = data
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    try:
        loaded = load_yaml(value)
    except yaml.YAMLError:
        raise InputError(f"override {shown}: the value is not YAML; quote it") from None
    if leaf in TAGS and node.get(leaf, loaded) != loaded:
        node.clear()  # another engine or source starts from its own defaults
    node[leaf] = loaded
