"""Manifests and aliases as they are read: a store may be somebody else's work, or damaged.

What passes here has the types that the rest of the program relies on, and every name in it that
becomes a path or part of a command has the form of our own names.
"""

import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .json_text import read_json

LARGEST = 64 << 20  # bytes; a manifest of 100,000 parts takes half of it
_DEEPEST = 50  # levels: what prints a config as YAML recurses
_LONGEST_REASON = 200
_STAGE, _ID = "[a-z-]+", "[0-9a-f]+"
_REF = re.compile(f"{_STAGE}/{_ID}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_ref(text: str) -> bool:
    """Whether a text is `stage/id` as this program writes it."""
    return _REF.fullmatch(text) is not None


def is_stage(text: str) -> bool:
    return re.fullmatch(_STAGE, text) is not None


def is_alias(text: str) -> bool:
    return _ALIAS.fullmatch(text) is not None


def one_line(text: str) -> str:
    """A text with line breaks, controls and everything else that is not printable written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def read_manifest(content: bytes, stage: str, dataset_id: str) -> dict[str, Any]:
    """The manifest of a dataset, as it was written.

    Raises:
        ValueError: its text says what is wrong, on one line.
    """
    value = _value(content)
    try:
        _Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise ValueError(one_line(f"{at}: {first['msg']}"[:_LONGEST_REASON])) from None
    if (value["stage"], value["id"]) != (stage, dataset_id):
        raise ValueError("it is another dataset's")
    return value


def read_aliases(content: bytes) -> tuple[dict[str, str], list[str]]:
    """Names with the datasets that they name, and names that are none or name nothing.

    Raises:
        ValueError: its text says what is wrong, on one line.
    """
    value = _value(content)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    good = {
        name: ref
        for name, ref in value.items()
        if is_alias(name) and isinstance(ref, str) and is_ref(ref)
    }
    return good, [name for name in value if name not in good]


def _value(content: bytes) -> Any:
    """Raises ValueError for what is no JSON, too long, or nested too deep."""
    if len(content) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST >> 20} MiB")
    value = read_json(content.decode())
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        level = [child for node in level for child in _children(node)]
    return value


def _children(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, dict | list)]


# --- what a manifest holds; a field that nothing reads may hold anything ---


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if str(path) != name or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError("is no path below the dataset's folder")
    return name


_Text = Annotated[str, Field(max_length=1000)]
_Moment = Annotated[_Text, AfterValidator(_moment)]
_Relative = Annotated[_Text, AfterValidator(_relative)]
_Ref = Annotated[_Text, Field(pattern=f"^{_STAGE}/{_ID}$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Strict):
    name: _Relative
    bytes: _Count
    sha256: _Sha256


class _Part(_File):
    name: Annotated[str, Field(pattern=r"^part-[0-9]{5,}\.parquet$")]
    rows: _Count


class _Policy(_Strict):
    path: str | None = None


class _Annotator(_Strict):
    engine: str | None = None
    name: str | None = None


class _Routing(_Strict):
    rule: str | None = None


class _Online(_Strict):
    routing: _Routing | None = None


class _Import(_Strict):
    layout: str
    file: str
    limit: int | None = None


class _Config(_Strict):
    policy: _Policy | None = None
    annotator: _Annotator | None = None
    routing: _Routing | None = None
    online: _Online | _Ref | None = None  # of a run, or the run that made a table
    imported: Annotated[_Import | None, Field(alias="import")] = None


class _Summary(_Strict):
    tables: dict[str, _Ref] = {}
    checkpoint: _Relative | None = None


class _Manifest(_Strict):
    stage: str
    id: str
    table: str | None
    schema_version: int | None
    config: _Config
    inputs: dict[str, _Ref]
    started_at: _Moment
    finished_at: _Moment
    seconds: float
    packages: dict[str, str]
    parts: list[_Part]
    files: list[_File] = []
    summary: _Summary
    manifest_sha256: _Sha256 | None = None
