"""Atomic, durable writes, and removal of the files that killed writers leave.

`StoreFiles` and the lock files build on this, and so does everything that writes reports, metrics
and checkpoints.
"""

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

# Names of files while they are written, and of folders (trace/checkpoint.py).
_TEMPORARY = re.compile(r".+\.tmp-\d+-\d+|\.tmp-.+", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
# The path is a folder, leads through a file, or is too long.
_NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY)
# Some network file systems can't sync folders.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

# Folders whose names this process knows to be durable, by device and inode.
_synced: set[tuple[int, int]] = set()


def temporary_name(path: str) -> str:
    """The name of a file until it is renamed to `path`; no two writers share one."""
    return f"{path}.tmp-{os.getpid()}-{time.monotonic_ns()}"


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file or folder that was never finished."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into an InputError; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            mend = "make room there"
        elif error.errno in _NOT_WRITABLE:
            mend = "make it writable"
        elif error.errno in _NO_FILE:
            mend = "name another path"
        else:
            raise
        raise InputError(
            f"{path}: could not be written ({os.strerror(error.errno)}); {mend} and give the same "
            "command again, it goes on from what is finished"
        ) from error


def write_atomic(path: Path, content: bytes, root: Path | None = None) -> None:
    """Write a file atomically and durably: temporary name, fsync, rename, fsync of the folder.

    A link at the path is replaced, not followed. root: see `make_folders`.

    Raises:
        InputError: the disk is full or the path is not writable; an older file is unharmed.
    """
    temporary = Path(temporary_name(str(path)))
    with writing(path):
        make_folders(path.parent, root)
        try:
            with os.fdopen(os.open(temporary, _NEW_FILE, 0o666), "wb") as file:
                # The lock tells `sweep` that the writer is alive.
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
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folders(folder: Path, root: Path | None = None) -> None:
    """Make a folder and its parents, durably.

    root: sync existing folders from the root downwards too, once per process. The process that made
    them may have been killed before its own sync.
    """
    if folder == folder.parent:  # the root of the file system
        return
    if not folder.exists():
        make_folders(folder.parent, root)
        folder.mkdir(exist_ok=True)
    elif root is None or not folder.is_relative_to(root) or _identity(folder) in _synced:
        return
    else:
        make_folders(folder.parent, root)
    with suppress(PermissionError):  # a parent that belongs to another user
        sync(folder.parent)
    _synced.add(_identity(folder))


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder and below it, without following links.

    The caller must hold the dataset's lock: a folder does not show whether its writer is alive.
    """
    with suppress(FileNotFoundError):
        for _, folders, files, descriptor in os.fwalk(folder):
            for name in [name for name in folders if is_temporary(name)]:
                folders.remove(name)
                about = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISDIR(about.st_mode):
                    shutil.rmtree(name, dir_fd=descriptor)
            for name in filter(is_temporary, files):
                _unlink_abandoned(descriptor, name)


def sweep_siblings(path: Path) -> None:
    """Remove the temporary files that killed writers of one file left in its folder."""
    with opened_folder(path.parent) as folder:
        for name in os.listdir(folder):  # noqa: PTH208 - a descriptor
            if name.startswith(f"{path.name}.tmp-") and is_temporary(name):
                _unlink_abandoned(folder, name)


def _unlink_abandoned(folder: int, name: str) -> None:
    """Remove a regular file unless its writer is alive and holds a lock on it."""
    with suppress(OSError):
        descriptor = os.open(name, _READ, dir_fd=folder)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(descriptor)
