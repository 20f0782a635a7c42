"""The identity of a model folder: a hash of every file that decides what the model answers.

Weights, config, generation config, tokenizer and chat templates count; documentation and training
state do not. SHA-256 of large files is cached by size, times and inode, so a second run does not
read 16 GB of weights again.
"""

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..data.atomic import write_atomic
from ..schemas.errors import InputError

logger = logging.getLogger(__name__)

# Names in the folder itself. Unknown JSON counts: tokenizers name their files as they like.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "vocab.*", "merges.*",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"
TRAINER_FILE = "trainer.safetensors"

_CACHED_FROM = 1 << 24  # bytes; smaller files are hashed in milliseconds
_RACY_NS = 2_000_000_000
_READERS = 4


def model_revision(path: str, trust_remote_code: bool = False) -> str:
    """Hash of a model folder's deciding files, 16 hex digits.

    trust_remote_code: Python files of the folder run, so they count too.

    Raises:
        InputError: no folder, or a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"policy {path}: is no folder; give a transformers model folder")
    files = _deciding_files(folder, trust_remote_code)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(cached_sha256, files))
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable or give another "
            "model folder"
        ) from None
    names = [os.path.relpath(file, folder) for file in files]
    listed = json.dumps(sorted(zip(names, digests, strict=True)))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def _deciding_files(folder: Path, trust_remote_code: bool) -> list[Path]:
    found = {
        file
        for file in folder.iterdir()
        if any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)
    }
    found |= set(folder.glob(f"{CHAT_TEMPLATES}/*.jinja"))
    for index in folder.glob("*.safetensors.index.json"):
        found |= {folder / name for name in _shards(index)}
    if trust_remote_code:
        found |= set(folder.rglob("*.py"))
    return sorted(file for file in found if file.is_file() and file.name != TRAINER_FILE)


def _shards(index: Path) -> set[str]:
    """Names of the weight files in an index; they may lie in a folder below."""
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{index}: is no index of weights; download the model again, or remove the file if "
            "model.safetensors holds all of them"
        ) from None


def cached_sha256(file: Path) -> str:
    """Hex digest of a file; of a large one from the cache, if it has not changed since."""
    before = file.stat()
    if before.st_size < _CACHED_FROM:
        return sha256_of(file)
    entry = _cache_folder() / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    known = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
    if (digest := _cached(entry, known)) is not None:
        return digest
    logger.info("hashing %s (%.1f GB), once", file, before.st_size / 1e9)
    digest = sha256_of(file)
    after = file.stat()
    # A file may change twice within one tick of the file system's clock, so the times of a file
    # that has just been written prove nothing yet (git calls such an entry racy).
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _RACY_NS
    same = known == [after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino]
    if settled and same:
        with suppress(OSError, InputError):  # a cache that cannot be written costs time alone
            write_atomic(entry, json.dumps([known, digest]).encode())
    return digest


def sha256_of(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cached(entry: Path, known: list[int]) -> str | None:
    """The digest in an entry of the cache; None if it is absent, damaged or of another state."""
    try:
        found: Any = json.loads(entry.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    match found:
        case [state, str(digest)] if state == known and _is_sha256(digest):
            return digest
    return None


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _cache_folder() -> Path:
    """$TRACE_OPD_CACHE, else trace-opd in the user's cache folder (XDG)."""
    if own := os.environ.get("TRACE_OPD_CACHE"):
        return Path(own) / "sha256"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "trace-opd" / "sha256"
