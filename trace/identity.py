"""Hashes of model folders: a model's identity, and the checksums of a checkpoint.

`model_revision` hashes every file that decides what a model answers: weights, config, generation
config, tokenizer and chat templates, but neither documentation nor training state. policy.py and
the stages that record a policy call it. SHA-256 of large files is cached by size, times and inode,
so a second run does not read 16 GB of weights again. checkpoint.py writes and checks SHA256SUMS,
which `sha256sum -c SHA256SUMS` checks too. Imports no torch.
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

from safetensors import SafetensorError, safe_open

from ..data.atomic import write_atomic
from ..schemas.environment import cache_folder
from ..schemas.errors import InputError

logger = logging.getLogger(__name__)

# Names in the folder itself. Every JSON file counts: tokenizers choose their own names.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "vocab.*", "merges.*",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"
TRAINER_FILE = "trainer.json"  # of a checkpoint, which is no model folder
CHECKSUMS = "SHA256SUMS"
_LOADED = (".safetensors", ".json")  # a loader reads such files even if the list does not name them

_CACHED_FROM = 1 << 24  # bytes; smaller files are hashed in milliseconds
_RACY_NS = 2_000_000_000
_READERS = 4


def model_revision(path: str, trust_remote_code: bool = False, weights: bool = True) -> str:
    """Hash of the files that decide what a model answers, 16 hex digits.

    trust_remote_code: the folder's Python files run, so they count too. weights: False leaves out
    the safetensors; what is left decides how text becomes tokens.

    Raises:
        InputError: no folder, or a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"policy {path}: is no folder; give a transformers model folder")
    files = _deciding_files(folder, trust_remote_code)
    files = [file for file in files if weights or file.suffix != ".safetensors"]
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(cached_sha256, files))
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable or give "
            "another "
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
    return sorted(file for file in found if file.is_file())


def _shards(index: Path) -> set[str]:
    """Names of the weight files in an index; they may be in a subfolder."""
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{index}: is no index of weights; download the model again, or remove the file if "
            "model.safetensors holds all of them"
        ) from None


def cached_sha256(file: Path) -> str:
    """Hex digest of a file; a large file's comes from the cache if the file has not changed."""
    before = file.stat()
    if before.st_size < _CACHED_FROM:
        return sha256_of(file)
    entry = cache_folder("sha256") / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    known = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
    if (digest := _cached(entry, known)) is not None:
        return digest
    logger.info("hashing %s (%.1f GB); the digest is cached", file, before.st_size / 1e9)
    digest = sha256_of(file)
    after = file.stat()
    # A file may change twice within one tick of the file system's clock, so the times of a file
    # written a moment ago prove nothing (git calls such an entry racy).
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _RACY_NS
    same = known == [after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino]
    if settled and same:
        with suppress(OSError, InputError):  # without a cache the file is hashed again
            write_atomic(entry, json.dumps([known, digest]).encode())
    return digest


def sha256_of(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cached(entry: Path, known: list[int]) -> str | None:
    """The digest in a cache entry; None if the entry is absent, damaged or out of date."""
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


def write_checksums(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write SHA256SUMS over all files of a folder, after every other file is written.

    known: digests by name, from `checksums`; the files without are read here.
    """
    digests = dict(known or {})
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    digests |= checksums(folder, [name for name in names if name not in digests])
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    (folder / CHECKSUMS).write_text("".join(lines))


def checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """Hex digests of a folder's files by name.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: sha256_of(folder / name), names)
        return dict(zip(names, found, strict=True))


def damage(folder: Path, read: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """How a folder differs from its SHA256SUMS; None if it does not, or if there is no list.

    read: False checks names and safetensors headers only, which takes milliseconds and finds
    missing and torn files. share: rank and number of ranks; each one reads its share of the files.

    Raises:
        OSError: a file cannot be read.
    """
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is truncated or damaged ({error})"
    sums = folder / CHECKSUMS
    if not sums.exists():
        return None
    try:
        listed = {name: digest for digest, name in map(_fields, sums.read_text().splitlines())}
    except ValueError:
        return f"{CHECKSUMS} is no list of checksums"
    if not listed:
        return f"{CHECKSUMS} is empty"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if gone := sorted(listed.keys() - there):
        return f"{gone[0]} is missing"
    foreign = [name for name in sorted(there - listed.keys()) if name.endswith(_LOADED)]
    if foreign:
        return f"{foreign[0]} was not written with it"
    if read:
        index, count = share
        found = checksums(folder, sorted(listed)[index::count])
        for name, now in found.items():
            if listed[name] != now:
                return f"{name} does not hold what was written"
    return None


def _fields(line: str) -> tuple[str, str]:
    digest, name = line.split("  ", 1)
    return digest, name
