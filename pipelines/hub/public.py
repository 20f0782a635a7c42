"""Configs without addresses, names of keys, and places on a machine, for cards that others read."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# Fields of our own configs, and of those of a user's code, whose values are never published.
_PRIVATE = re.compile(
    r"(?:.*_)?(?:api_?key|token|secret|password|credentials?|urls?|hosts?|address(?:es)?)(?:_env)?"
    r"|weights_folder"
)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.I | re.S)
_PLACE = re.compile(r"(?:/|~|\.{1,2}/|[A-Za-z]:[\\/])[^\n]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST_LIST = 20
_INSIDE_NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def public(value: Any) -> Any:
    """JSON data without private fields; of a path or an address only the last name is left."""
    if isinstance(value, dict):
        return {k: public(v) for k, v in value.items() if not _PRIVATE.fullmatch(str(k))}
    if isinstance(value, list):
        return [public(entry) for entry in value]
    return public_text(value) if isinstance(value, str) else value


def public_text(text: str) -> str:
    """A text; of a path or an address only the last name. Ids of the hub stay."""
    if found := _URL.fullmatch(text):
        return text if found[1] == "hf" else _last(found[2].partition("?")[0])
    return _last(text) if _PLACE.fullmatch(text) else text


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary's figures that a reader of a card can use: no long lists, nothing per part."""
    short = {k: v for k, v in summary.items() if k != "per_part" and not _is_long(v)}
    return public(short)


def hub_id(path: str) -> str | None:
    """The id of a model on the hub, owner/name; None for anything else."""
    return path if _HUB_ID.fullmatch(path) else None


def renamed(settings: Any, base: str) -> Any:
    """A model's JSON settings with `base` wherever they name a place that it was loaded from."""
    if not isinstance(settings, dict):
        return settings
    changed = {key: base for key in _INSIDE_NAMES if settings.get(key)}
    return {k: renamed(v, base) for k, v in settings.items()} | changed


def _is_long(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) > _LONGEST_LIST or any(map(_is_long, value.values()))
    return isinstance(value, list) and len(value) > _LONGEST_LIST


def _last(path: str) -> str:
    windows = "\\" in path and "/" not in path
    name = (PureWindowsPath if windows else PurePosixPath)(path).name
    return name or "…"
