"""Locks between processes: one run at a time works on a dataset.

flock(2) on a file that names its holder. The lock dies with its process, however that ends, so none
is ever stale; a file that a kill left behind is removed by the next release in its folder.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import writing

logger = logging.getLogger(__name__)

_FOLDER = ".locks"  # holds nothing else
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SWEEP_S = 0.05  # longer than `remove_unheld` holds a lock that is nobody's

_held: set[int] = set()


@contextmanager
def locked(root: Path, name: str, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a name under a root; a file `<root>/.locks/<name>` is made, and removed again.

    waits: called once with who holds it, if somebody does, before this waits for them; whatever it
    raises ends the attempt. A file system without locks is worked on without one, and told.

    Raises:
        InputError: the lock's file can't be written.
    """
    path = _path(root, name)
    try:
        with writing(path):
            descriptor = _acquire(path, waits)
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
        # In this order: who opens the file from now on makes another one.
        with suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)
        remove_unheld(root)


def holder(root: Path, name: str) -> str | None:
    """Who holds a name now: "process 123", with the machine if it is another one."""
    try:
        descriptor = os.open(_path(root, name), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return None if _try(descriptor) else _named(descriptor)
    finally:
        os.close(descriptor)


def remove_unheld(root: Path) -> None:
    """Remove the files of locks whose holders were killed, and their folder with the last one."""
    folder = root / _FOLDER
    with suppress(OSError):
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _try(descriptor) and _is_at(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)
        folder.rmdir()


def _path(root: Path, name: str) -> Path:
    return root / _FOLDER / name.replace("/", ".")


def _acquire(path: Path, waits: Callable[[str], None] | None) -> int:
    """A descriptor of the path's file, locked, with this process's name in the file."""
    told = False
    while True:
        descriptor = _open(path)
        try:
            if not _try(descriptor):
                time.sleep(_SWEEP_S)
                if not _try(descriptor):
                    if waits is not None and not told:
                        waits(_named(descriptor))
                        told = True
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it: the lock is another file's by now


def _open(path: Path) -> int:
    while True:
        # The folder may be removed with its last lock, between the two and within the first.
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _named(descriptor: int) -> str:
    pid, _, host = os.pread(descriptor, 1000, 0).decode().partition(" ")
    if not pid:
        return "another process"
    return f"process {pid}" + (f" on {host}" if host != socket.gethostname() else "")


def _let_go() -> None:
    """A forked child has its parent's descriptors, and would hold its locks beyond its death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
