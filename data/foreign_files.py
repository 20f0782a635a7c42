"""Files of others, opened and read within bounds: a path, a URL that fsspec knows, or a glob of them."""

import hashlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import InputError

# What is read is held in memory or becomes a table: more than this is no file of problems.
_MOST_FILE_BYTES = 16 << 30
_MOST_LINE_CHARS = 16 << 20
_BLOCK_BYTES = 1 << 20


def find_files(pattern: str, kinds: str) -> tuple[Any, list[str]]:
    """The file system, and the paths on it in order. kinds: what the files should be, for the sentence.

    Raises:
        InputError: an unknown protocol, a file system that does not answer, no such file, a folder, a
            device, a pipe, or a file that is too large.
    """
    for part in pattern.split(
        "::"
    ):  # file systems of archives read what they are chained to at once
        _require_no_device(part, kinds)
    with _file_system_errors(pattern, kinds):
        fs, base = fsspec.core.url_to_fs(pattern)
        paths = sorted(str(path) for path in fs.glob(base))
        about = [fs.info(path) for path in paths]
    if not paths:
        raise InputError(f"{pattern}: no such file; give {kinds}")
    for path, info in zip(paths, about, strict=True):
        if info["type"] != "file":
            raise InputError(f"{path}: is a {_kind(info)}, no regular file; give {kinds}")
        if (info.get("size") or 0) > _MOST_FILE_BYTES:
            raise _too_large(path)
    return fs, paths


@contextmanager
def opened(fs: Any, path: str) -> Iterator[Any]:
    """A file open for reading bytes.

    Raises:
        InputError: it cannot be opened, or cannot be read where it is read in the `with` block.
    """
    local = isinstance(fs, LocalFileSystem)
    if local and Path(path).is_file() and not Path(path).stat().st_size:
        yield BytesIO()  # the kernel's own files (/proc/kmsg) state no size, and may block
        return
    with _file_system_errors(path, "another file", local), fs.open(path, "rb") as file:
        yield file


def digest(fs: Any, path: str) -> str:
    """SHA-256 of a file. Raises InputError if it cannot be read or does not end."""
    found, size = hashlib.sha256(), 0
    with opened(fs, path) as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            size += len(block)
            if size > _MOST_FILE_BYTES:  # the size of a stream is not known before
                raise _too_large(path)
    return found.hexdigest()


def text_lines(file: Any, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 0.

    Raises:
        InputError: no UTF-8, or a line of more than 16 million characters.
    """
    text = TextIOWrapper(file, encoding="utf-8")
    row = 0
    try:
        while line := text.readline(_MOST_LINE_CHARS + 1):
            if len(line) > _MOST_LINE_CHARS:
                raise InputError(
                    f"{name}, row {row}: is longer than {_MOST_LINE_CHARS:,} characters; write one "
                    "JSON object per line"
                )
            yield row, line
            row += 1
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; give a Parquet or JSONL file") from None


def _require_no_device(path: str, kinds: str) -> None:
    """Refuse what may block or never end, before anything is opened."""
    local = path.removeprefix("file://").removeprefix("local://")
    try:
        mode = Path(local).expanduser().stat().st_mode
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # not there, or no local path: the file system says so
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a {_kind_of_mode(mode)}, no regular file; give {kinds}")


def _kind(info: dict[str, Any]) -> str:
    if info["type"] == "directory":
        return "folder"
    return _kind_of_mode(info.get("mode", 0))


def _kind_of_mode(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _too_large(path: str) -> InputError:
    return InputError(f"{path}: is larger than {_MOST_FILE_BYTES >> 30} GiB; split it")


@contextmanager
def _file_system_errors(path: str, kinds: str, local: bool = False) -> Iterator[None]:
    """Turns a file system's errors into one sentence. Remote ones have exceptions of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if local and not isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read ({reason:.200}); check the path, the URL and the network, or "
            f"give {kinds}"
        ) from None
