"""Compressed files of users, unpacked while they are read and within a limit.

input_files.py opens files through `unpacked`; source `hub` checks a local folder's archives.
"""

import bz2
import gzip
import io
import lzma
import posixpath
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..schemas.errors import InputError

# The limit on what a file unpacks to, in bytes or times its own size.
_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES = 256 << 20, 100
_BLOCK_BYTES = 1 << 20
_DAMAGE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


def _zstd(file: Any) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


_STREAMS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    **({".zst": _zstd} if pa.Codec.is_available("zstd") else {}),
}
COMPRESSED = tuple(_STREAMS)


def bare_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in _STREAMS else name


def unpacked(file: Any, name: str) -> Any:
    """The content of an open file, unpacked if its name has a known compression's suffix.

    Reading raises InputError if the content is damaged or above the limit.
    """
    open_stream = _STREAMS.get(posixpath.splitext(name)[1].lower())
    return file if open_stream is None else io.BufferedReader(_Unpacked(file, name, open_stream))


class _Counted(io.RawIOBase):
    """A file that counts the bytes read from it."""

    def __init__(self, file: Any) -> None:
        self._file, self.size = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self.size += len(block)
        return len(block)


class _Unpacked(io.RawIOBase):
    """The bytes that a compressed file stands for, up to the limit."""

    def __init__(self, file: Any, name: str, open_stream: Callable[[Any], Any]) -> None:
        self._packed, self._name, self._size = _Counted(file), name, 0
        self._stream = open_stream(self._packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk or the network failed, not the file
            raise _damaged(self._name, error) from None
        self._size += len(block)
        most = max(_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES * self._packed.size)
        if self._size > most:
            raise _too_large(self._name, most)
        buffer[: len(block)] = block
        return len(block)


def require_bounded_archive(path: Path) -> None:
    """Check the unpacked size of a file with a compressed format's suffix; other files pass.

    Raises:
        InputError: it is damaged, above the limit, or in a format that can't be measured.
    """
    suffix = {".tgz": ".gz"}.get(path.suffix, path.suffix)
    if suffix == ".zip":
        most = max(_MOST_UNPACKED_BYTES, _MOST_UNPACKED_TIMES * path.stat().st_size)
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
        except _DAMAGE as error:
            raise _damaged(str(path), error) from None
        if size > most:
            raise _too_large(str(path), most)
    elif suffix in _STREAMS:
        with path.open("rb") as file:
            content = _Unpacked(file, str(path), _STREAMS[suffix])
            while content.read(_BLOCK_BYTES):
                pass
    elif suffix in (".zst", ".lz4", ".7z", ".rar"):
        raise InputError(f"{path}: is compressed; unpack it")


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: is damaged ({error!s:.200}); copy it again")


def _too_large(name: str, most: int) -> InputError:
    return InputError(f"{name}: unpacks to more than {most:,} bytes; unpack it and check it")
