"""Files that users name, read within limits: a path, a URL that fsspec knows, a glob, a folder.

Sources of problems and readers of human labels open their files here. Manifests and prompts use
`read_json`.
"""

import hashlib
import json
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator
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


def find_files(
    pattern: str, kinds: str, in_folders: Callable[[str], bool] | None = None
) -> tuple[Any, list[str]]:
    """The file system and the sorted paths of a pattern. kinds: what to give, for error messages.

    in_folders: which files of a folder, and of those in it, are taken in the folder's place;
    hidden ones and those of stores are left out. None: a folder is refused.

    Raises:
        InputError: an unknown protocol, a file system that does not answer, no such file, a file
            that is not regular (folder, device, pipe), or one that is too large.
    """
    for part in pattern.split("::"):  # fsspec opens the inner file of a chained URL at once
        _require_no_device(part, kinds)
    with _file_system_errors(pattern, kinds):
        fs, base = fsspec.core.url_to_fs(pattern)
        about = {str(path): fs.info(path) for path in sorted(fs.glob(base))} if pattern else {}
    if not about:
        raise InputError(f"{pattern}: no such file; give {kinds}")
    for path, info in list(about.items()):
        if info["type"] == "directory" and in_folders is not None:
            del about[path]
            with _file_system_errors(path, kinds):
                found = {str(held): fs.info(held) for held in fs.find(path)}
            stores = _stores_below(path, found)
            inside = {
                held: info
                for held, info in found.items()
                if in_folders(held) and not _hidden(held, path) and not held.startswith(stores)
            }
            if not inside:
                raise InputError(f"{path}: is a folder, and holds no such file; give {kinds}")
            about |= inside
    for path, info in about.items():
        if isinstance(fs, LocalFileSystem):  # a link in a folder or a glob may lead to a device
            _require_no_device(path, kinds)
        if info["type"] != "file":
            folder = info["type"] == "directory"
            kind = "folder" if folder else _kind_of_mode(info.get("mode", 0))
            raise InputError(f"{path}: is a {kind}, not a regular file; give {kinds}")
        if (info.get("size") or 0) > _MOST_FILE_BYTES:
            raise _too_large(path)
    return fs, sorted(about)


def _hidden(path: str, folder: str) -> bool:
    return any(part.startswith(".") for part in posixpath.relpath(path, folder).split("/"))


def _stores_below(folder: str, paths: Iterable[str]) -> tuple[str, ...]:
    """The stores below a folder, by the manifests of their datasets; each ends with a slash."""
    manifest = re.compile(
        rf"({re.escape(folder.rstrip('/'))}/.+?/)[a-z-]+/[0-9a-f]{{16}}/manifest.json"
    )
    return tuple({match[1] for path in paths if (match := manifest.fullmatch(path))})


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


def text_lines(file: Any, name: str, most: int | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, with or without a byte order mark, numbered from 0.

    most: characters of a line, by default 16 million.

    Raises:
        InputError: not UTF-8, or a longer line.
    """
    text = TextIOWrapper(file, encoding="utf-8-sig")
    most = most or _MOST_LINE_CHARS
    row = 0
    try:
        while line := text.readline(most + 1):
            if len(line) > most:
                raise InputError(
                    f"{name}, row {row}: is longer than {most:,} characters; write one row per line"
                )
            yield row, line
            row += 1
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; save it as UTF-8") from None


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
