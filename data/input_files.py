"""Files that users name, read within limits: a path, a URL that fsspec knows, or a glob of them.

Sources of problems and readers of human labels open their files here. Manifests and prompts use
`read_json`.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import InputError

# Content is held in memory or becomes a table; a larger file does not hold problems.
_MOST_FILE_BYTES = 16 << 30
_MOST_LINE_CHARS = 16 << 20
_BLOCK_BYTES = 1 << 20
# The limit on what a compressed file unpacks to, in bytes or times its own size.
_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES = 256 << 20, 100
_STREAMS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def find_files(pattern: str, kinds: str) -> tuple[Any, list[str]]:
    """The file system and the sorted paths of a pattern. kinds: what to give, for error messages.

    Raises:
        InputError: an unknown protocol, a file system that does not answer, no such file, a file
            that is not regular (folder, device, pipe), or one that is too large.
    """
    for part in pattern.split("::"):  # fsspec opens the inner file of a chained URL at once
        _require_no_device(part, kinds)
    with _file_system_errors(pattern, kinds):
        fs, base = fsspec.core.url_to_fs(pattern)
        paths = sorted(str(path) for path in fs.glob(base))
        about = [fs.info(path) for path in paths]
    if not paths:
        raise InputError(f"{pattern}: no such file; give {kinds}")
    for path, info in zip(paths, about, strict=True):
        if info["type"] != "file":
            folder = info["type"] == "directory"
            kind = "folder" if folder else _kind_of_mode(info.get("mode", 0))
            raise InputError(f"{path}: is a {kind}, not a regular file; give {kinds}")
        if (info.get("size") or 0) > _MOST_FILE_BYTES:
            raise _too_large(path)
    return fs, paths


@contextmanager
def opened(fs: Any, path: str) -> Iterator[Any]:
    """A file open for reading bytes.

    Raises:
        InputError: it cannot be opened, or reading it in the `with` block fails.
    """
    local = isinstance(fs, LocalFileSystem)
    if local and Path(path).is_file() and not Path(path).stat().st_size:
        yield BytesIO()  # kernel files such as /proc/kmsg state size 0, and reading them may block
        return
    with _file_system_errors(path, "another file", local), fs.open(path, "rb") as file:
        yield file


def digest(fs: Any, path: str) -> str:
    """SHA-256 of a file. Raises InputError if it cannot be read or is too large."""
    found, size = hashlib.sha256(), 0
    with opened(fs, path) as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            size += len(block)
            if size > _MOST_FILE_BYTES:  # a stream states no size
                raise _too_large(path)
    return found.hexdigest()


def text_lines(file: Any, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 0.

    Raises:
        InputError: not UTF-8, or a line of more than 16 million characters.
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


def json_objects(
    lines: Iterator[tuple[int, str]], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of numbered JSON lines; blank lines are skipped.

    Raises:
        InputError: a line is not JSON, or not an object.
    """
    for row, line in lines:
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except ValueError as error:
            raise InputError(f"{name}, row {row}: is not JSON ({error}); mend the line") from None
        if not isinstance(value, dict):
            raise InputError(f"{name}, row {row}: is not a JSON object; write one object per line")
        yield row, value


def read_json(text: str) -> Any:
    """The value of a JSON text; what Python's reader accepts but no table can hold is refused.

    Raises:
        ValueError: not JSON, nested too deep, a number of thousands of digits, or half of a
            surrogate pair; the message says which.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value


def require_bounded_archive(path: Path) -> None:
    """Check the unpacked size of a file with a compressed format's suffix; other files pass.

    Raises:
        InputError: it is damaged, above the limit, or in a format that can't be measured.
    """
    most = max(_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES * path.stat().st_size)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
        elif path.suffix in _STREAMS:
            size = 0
            with _STREAMS[path.suffix](path) as file:
                while size <= most and (block := file.read(_BLOCK_BYTES)):
                    size += len(block)
        elif path.suffix in (".zst", ".lz4", ".7z", ".rar"):
            raise InputError(f"{path}: is compressed; unpack it")
        else:
            return
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged ({error!s:.200}); copy it again") from None
    if size > most:
        raise InputError(f"{path}: unpacks to more than {most:,} bytes; unpack it and check it")


def _require_no_device(path: str, kinds: str) -> None:
    """Refuse files that may block or never end, before anything is opened."""
    local = path.removeprefix("file://").removeprefix("local://")
    try:
        mode = Path(local).expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError):
        return  # absent, or not a local path: the file system reports that
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a {_kind_of_mode(mode)}, not a regular file; give {kinds}")


def _kind_of_mode(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _too_large(path: str) -> InputError:
    return InputError(f"{path}: is larger than {_MOST_FILE_BYTES >> 30} GiB; split it")


@contextmanager
def _file_system_errors(path: str, kinds: str, local: bool = False) -> Iterator[None]:
    """Turn a file system's errors, of whatever type, into an InputError."""
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
