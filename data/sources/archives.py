"""A limit on the unpacked size of compressed files, checked before a library unpacks them to disk.

The source of kind `hub` calls this for local folders.
"""

import bz2
import gzip
import lzma
import zipfile
import zlib
from pathlib import Path

from ...schemas.errors import InputError

_MOST_BYTES, _MOST_TIMES = 256 << 20, 100
_BLOCK_BYTES = 1 << 20
_STREAMS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def require_bounded_archive(path: Path) -> None:
    """Check the unpacked size of a file with a compressed format's suffix; other files pass.

    Raises:
        InputError: it is damaged, above the limit, or in a format that can't be measured.
    """
    most = max(_MOST_BYTES, _MOST_TIMES * path.stat().st_size)
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
