"""Locks between processes: one run at a time works on a dataset.

A lock is flock(2) on a file that names its holder. The kernel drops it when the process ends, so no
lock is ever stale. A lock file that a killed process left is removed by the next release in its
folder. A store may come from somebody else: no link is followed, and only a file with the content
that `_acquire` writes is written or removed. `StoreFiles.locked` and model downloads lock here.
"""

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..schemas.errors import InputError
from .atomic import make_folders, writing
from .links import open_below, opened_folder

logger = logging.getLogger(__name__)

_FOLDER = ".locks"  # for lock files alone
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SWEEP_S = 0.05  # longer than `remove_unheld` holds a lock while it removes the file
# Process and host. A power loss may leave any prefix of it, padded with zero bytes.
_CONTENT = re.compile(rb"(?:(\d{1,10})(?: ([!-~]{0,255}))?)?\0*")
_LONGEST = 300

_held: set[int] = set()


@contextmanager
def locked(
    root: Path, name: str, waits: Callable[[str], None] | None = None, shared: bool = False
) -> Iterator[None]:
    """Hold a name under a root exclusively; the file `<root>/.locks/<name>` exists meanwhile.

    root: a path without links. waits: called once with the holder before this blocks; an exception
    from it ends the attempt. shared: several processes may hold the name so at once, while none
    holds it exclusively. On a file system without locks this warns and locks nothing.

    Raises:
        InputError: the lock file can't be written, is a link, or is not a lock file.
    """
    path = root / _FOLDER / _file_name(name)
    try:
        with writing(path):
            descriptor = _acquire(root, name, waits, shared)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "%s: this file system has no locks (%s); start no second run of the same dataset",
            root,
            error.strerror,
        )
        yield
        return
    _held.add(descriptor)
    try:
        yield
    finally:
        # Unlink before release: a process that opens the path from now on creates another file.
        # Of several holders none may; `remove_unheld` does it after the last one.
        with suppress(OSError, InputError), opened_folder(root, _FOLDER) as folder:
            if not shared and _is_at(descriptor, folder, path.name):
                os.unlink(path.name, dir_fd=folder)
        _held.discard(descriptor)
        os.close(descriptor)
        remove_unheld(root)


def holder(root: Path, name: str) -> str | None:
    """The current holder of a name: "process 123", with the host if it is another one."""
    path = root / _FOLDER / _file_name(name)
    try:
        with opened_folder(root, _FOLDER) as folder:
            descriptor = open_below(folder, path.name, os.O_RDONLY | os.O_NONBLOCK, path)
    except (OSError, InputError):  # absent, or a link, which is not a lock
        return None
    try:
        return None if _try(descriptor) else _named(descriptor)
    finally:
        os.close(descriptor)


def remove_unheld(root: Path) -> None:
    """Remove the lock files of killed holders, and their folder if it is empty then."""
    with suppress(OSError, InputError), opened_folder(root) as parent:
        with opened_folder(root, _FOLDER) as folder:
            for name in os.listdir(folder):  # noqa: PTH208 - a descriptor
                with suppress(OSError, InputError):
                    _remove_unheld(folder, name, root / _FOLDER / name)
        os.rmdir(_FOLDER, dir_fd=parent)


def _remove_unheld(folder: int, name: str, path: Path) -> None:
    descriptor = open_below(folder, name, os.O_RDONLY | os.O_NONBLOCK, path)
    try:
        if _try(descriptor) and _is_ours(descriptor) and _is_at(descriptor, folder, name):
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(descriptor)


def any_held(root: Path, prefix: str) -> bool:
    """Whether a process holds a name that begins so."""
    try:
        names = os.listdir(root / _FOLDER)  # noqa: PTH208 - names alone
    except OSError:
        return False
    return any(name.startswith(_file_name(prefix)) and holder(root, name) for name in names)


def _file_name(name: str) -> str:
    return name.replace("/", ".")


def _acquire(
    root: Path, name: str, waits: Callable[[str], None] | None, shared: bool = False
) -> int:
    """A locked descriptor of the lock file, which now names this process unless it is shared."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    path = root / _FOLDER / _file_name(name)
    waited = False
    while True:
        descriptor, folder = _open(root, path)
        try:
            if not _try(descriptor, kind):
                time.sleep(_SWEEP_S)
                if not _try(descriptor, kind):
                    if waits is not None and not waited:
                        waits(_named(descriptor))
                        waited = True
                    fcntl.flock(descriptor, kind)
            if not _is_ours(descriptor):
                raise InputError(
                    f"{path}: is not a lock file of this program; move it elsewhere and give the "
                    "same command again"
                )
            if _is_at(descriptor, folder, path.name):
                os.ftruncate(descriptor, 0)
                if not shared:  # two holders would write over each other
                    holder_name = f"{os.getpid()} {socket.gethostname()}"
                    os.pwrite(descriptor, holder_name.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            os.close(folder)
        os.close(descriptor)  # the holder unlinked it, so the path may be another file by now


def _open(root: Path, path: Path) -> tuple[int, int]:
    """Descriptors of the lock file and its folder, both created if needed."""
    try:
        while True:
            # Another process may remove the empty folder between any two of these calls.
            with suppress(FileNotFoundError):
                make_folders(root, root)
                with opened_folder(root) as parent, suppress(FileExistsError):
                    os.mkdir(_FOLDER, dir_fd=parent)
                with opened_folder(root, _FOLDER) as folder:
                    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
                    return open_below(folder, path.name, flags, path), os.dup(folder)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(
            f"{path}: can't be made ({error.strerror}); remove what is in its place, or pass "
            "--store with another path"
        ) from None


def _try(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, folder: int, name: str) -> bool:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


def _is_ours(descriptor: int) -> bool:
    """Whether `_acquire` wrote the file: regular, without hard links, with its form of content."""
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1 or about.st_size > _LONGEST:
        return False
    return _CONTENT.fullmatch(os.pread(descriptor, _LONGEST, 0)) is not None


def _named(descriptor: int) -> str:
    found = _CONTENT.fullmatch(os.pread(descriptor, _LONGEST, 0))
    if found is None or found[2] is None:
        return "another process"
    pid, host = found[1].decode(), found[2].decode()
    return f"process {pid}" + (f" on {host}" if host != socket.gethostname() else "")


def _let_go() -> None:
    """Close inherited descriptors, through which a forked child would keep its parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
