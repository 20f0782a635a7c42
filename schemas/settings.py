"""Configs from YAML files with `key=value` overrides, and back to YAML."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import InputError

C = TypeVar("C", bound=BaseModel)


def load_config(
    model: type[C],
    path: str | Path | None,
    overrides: list[str] | None = None,
    section: str | None = None,
) -> C:
    """Read a YAML file (or nothing), apply `a.b=value` overrides, validate.

    `section` names the part of a pipeline's YAML that holds this stage's config; a file that has
    no such key is taken whole. Values of overrides are YAML: `3`, `true`, `null`, `[1, 2]`.

    Raises:
        InputError: unreadable file, malformed override, unknown key or bad value.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give the path of a YAML config") from None
        except yaml.YAMLError as error:
            raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: holds no mapping; write `key: value` lines")
        if section and section in data and isinstance(data[section], dict):
            data = data[section]
    for override in overrides or []:
        _apply(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        where = str(path) if path is not None else "config"
        raise InputError(explain(error, where)) from None


def explain(error: ValidationError, where: str) -> str:
    """One sentence for the first fault of a pydantic error, and how many more there are."""
    first, *others = error.errors()
    # Tags of discriminated unions stand in `loc` too; they are no keys, but they help to read.
    field = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        what = f"{field}: unknown key; see --help or `trace-opd config` for the known ones"
    elif first["type"] == "missing":
        what = f"{field}: is required; set it in the file or as {field}=value"
    else:
        what = f"{field}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r:.80})"
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {what}{more}"


def dump_config(config: BaseModel) -> str:
    """The whole config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: write it as key=value, e.g. sampling.top_k=20")
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML; quote it") from None
