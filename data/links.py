"""Paths below a root that follow no symbolic link: a store may come from somebody else.

A link below the root could make this program read, overwrite or delete files outside the store, so
every link is refused. The root itself may be a link to a folder. `StoreFiles`, the locks and
`verify-store` open files here.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..schemas.errors import DamagedFile, InputError

# Errors of open(2) with O_NOFOLLOW for a link; ENOTDIR with O_DIRECTORY on Linux.
_LINK_ERRORS = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR)
# O_NONBLOCK: opening a FIFO would wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DEEPEST = 50  # levels, since functions of `shutil` and `os` recurse
_TRACKERS = ("wandb",)  # folders in which a tracker keeps links of its own
_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY


def real_root(root: str | Path) -> Path:
    """The root's path with links resolved. It need not exist yet.

    Raises:
        InputError: the root, or a folder above it, is a dangling link, or it can be no path.
    """
    path = Path(root)
    if "\0" in str(root):
        raise InputError(
            f"store {str(root)!r:.300}: has a NUL character; pass --store another path"
        )
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not os.path.exists(nearest):  # noqa: PTH110 - False for every error, as lexists
        leads = f"a link to {str(nearest.readlink())!r}" if nearest.is_symlink() else "a place"
        raise InputError(
            f"store {root}: {nearest} is {leads} that is not there; mount or make that folder, or "
            "pass --store with another path"
        )
    return path.resolve()


def refuse_links(root: Path, path: str) -> None:
    """Raises InputError if a component below the root is a symbolic link."""
    at = root
    for name in PurePosixPath(path).parts:
        at = at / name
        if at.is_symlink():
            raise _link(at)


def refuse_links_in(folder: Path) -> None:
    """Raises InputError if a folder or anything below it is a symbolic link, or nested too deep."""
    if folder.is_symlink():
        raise _link(folder)
    deepest = len(folder.parts) + _DEEPEST
    for entry in entries_in(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            raise _link(path)
        if len(path.parts) > deepest:
            raise InputError(f"{str(folder)!r}: holds folders nested too deep; remove them")


def entries_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder, parents first. Links are listed but not followed; the content of a
    tracker's own folder is skipped."""
    waiting = [str(folder)]
    while waiting:
        # A folder may be removed meanwhile, and a path of thousands of levels can't be opened.
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False) and entry.name not in _TRACKERS:
                    waiting.append(entry.path)


@contextmanager
def opened_folder(root: Path, path: str = "") -> Iterator[int]:
    """A descriptor of a folder at or below a root, for the `dir_fd` argument of functions of `os`.

    Raises:
        InputError: a component below the root is a link.
        OSError: there is no such folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        at = root
        for name in PurePosixPath(path).parts:
            at = at / name
            inner = open_below(descriptor, name, _DIRECTORY, at)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def open_below(folder: int, name: str, flags: int, shown: Path) -> int:
    """Open an entry of a folder (a descriptor) unless it is a link. shown: its path, for the error.

    Raises:
        InputError: it is a link.
        OSError: as `os.open`.
    """
    try:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in _LINK_ERRORS:
            with suppress(OSError):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise _link(shown) from None
        raise


def open_file(root: Path, path: str) -> BinaryIO:
    """A regular file below a root, open for reading.

    Raises:
        InputError: a component of the path is a link.
        DamagedFile: it is a folder, a FIFO or a device.
        OSError: there is no such file, or it can't be read.
    """
    parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
    with opened_folder(root, parent) as folder:
        descriptor = open_below(folder, name, _READ, root / path)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFile(f"{root / path}: is not a regular file; remove it or put the file there")
    return os.fdopen(descriptor, "rb")


def _link(path: Path) -> InputError:
    return InputError(
        f"{str(path)!r}: is a symbolic link, and a store holds none; put a copy of the file or "
        "folder in its place, or remove it"
    )
