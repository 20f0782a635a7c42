"""Atomic, durable writes, and removal of what killed writers leave."""

import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..schemas.errors import InputError
from .links import opened_folder

# A file's name while it is written, and a folder's (trace/checkpoint.py).
_TEMPORARY = re.compile(r".+\.tmp-\d+-\d+|\.tmp-.+", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
# Some network file systems sync no folders.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

# Folders whose names this process has seen to be on the disk, by device and inode.
_synced: set[tuple[int, int]] = set()


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
    """Write a file atomically and durably: temporary name, fsync, rename, fsync of the folder.

    A link at the path is replaced, not followed.

    Raises:
        InputError: no room, or not writable; whatever had the name before is unharmed.
    """
    temporary = Path(temporary_name(str(path)))
    with writing(path):
        make_folders(path.parent)
        try:
            with os.fdopen(os.open(temporary, _NEW_FILE, 0o666), "wb") as file:
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
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folders(folder: Path, root: Path | None = None) -> None:
    """Make a folder and those above it, and return when their names are on the disk.

    root: it and the folders below it are synced into their parents even if they are there already:
    the process that made them may have been killed before it did that. Once in a process is enough.
    """
    if not folder.exists():
        make_folders(folder.parent, root)
        folder.mkdir(exist_ok=True)
    elif root is None or not folder.is_relative_to(root) or _identity(folder) in _synced:
        return
    else:
        make_folders(folder.parent, root)
    with suppress(PermissionError):  # a parent that is not ours
        sync(folder.parent)
    _synced.add(_identity(folder))


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder and below it; links are not followed.

    The caller holds the dataset's lock: a folder does not tell that somebody is filling it.
    """
    with suppress(FileNotFoundError):
        for _, folders, files, descriptor in os.fwalk(folder):
            for name in [name for name in folders if is_temporary(name)]:
                folders.remove(name)
                if _is_folder(descriptor, name):
                    shutil.rmtree(name, dir_fd=descriptor)
            for name in filter(is_temporary, files):
                _unlink_abandoned(descriptor, name)


def sweep_siblings(path: Path) -> None:
    """Remove what killed writers of a file left in its folder."""
    with opened_folder(path.parent) as folder:
        for name in os.listdir(folder):  # noqa: PTH208 - a descriptor
            if name.startswith(f"{path.name}.tmp-") and is_temporary(name):
                _unlink_abandoned(folder, name)


def _is_folder(folder: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _unlink_abandoned(folder: int, name: str) -> None:
    """Remove a regular file of a folder unless its writer lives, who holds a lock on it."""
    with suppress(OSError):
        descriptor = os.open(name, _READ, dir_fd=folder)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(descriptor)
