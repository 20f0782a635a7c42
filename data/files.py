"""Files that are there whole or not at all, and what a kill leaves of those that were not."""

import errno
import fcntl
import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..schemas.errors import InputError

# A file's name while it is written, and a folder's (trace/checkpoint.py).
_TEMPORARY = re.compile(r".+\.tmp-\d+-\d+|\.tmp-.+")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


def temporary_name(path: str) -> str:
    """Where a file is written before it gets its name; no two writers share one."""
    return f"{path}.tmp-{os.getpid()}-{time.monotonic_ns()}"


def is_temporary(name: str) -> bool:
    """Whether a file's or folder's name says that it was never finished."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Says what an error of the file system means for a run.

    Raises:
        InputError: no room, or not writable; other errors pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            mend = "make room there"
        elif error.errno in _NOT_WRITABLE:
            mend = "make it writable"
        else:
            raise
        raise InputError(
            f"{path}: could not be written ({os.strerror(error.errno)}); {mend} and give the same "
            "command again, it goes on from what is finished"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises:
        InputError: no room, or not writable; whatever had the name before is unharmed.
    """
    temporary = Path(temporary_name(str(path)))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                # While it is held nobody takes the file for a dead writer's.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 - atomic on POSIX
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder and below it.

    The caller holds the dataset's lock: a folder does not tell that somebody is filling it.
    """
    for path in [path for path in folder.rglob("*") if is_temporary(path.name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            _unlink_abandoned(path)


def sweep_siblings(path: Path) -> None:
    """Remove what killed writers of a file left beside it."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        if is_temporary(leftover.name):
            _unlink_abandoned(leftover)


def _unlink_abandoned(temporary: Path) -> None:
    """Remove a file unless its writer lives, who holds a lock on it."""
    with suppress(FileNotFoundError, BlockingIOError), temporary.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink()
