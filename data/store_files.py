"""The files of a store, on a local disk or on any fsspec file system: paths, reads, writes, locks.

`Store`, `Dataset` and `Draft` do all their reading and writing through `StoreFiles`, which knows
nothing of datasets. Two kinds of paths: a safe path is a file's full path in the store; a local
path is a file on this machine, which a remote store keeps below $TRACE_OPD_LOCAL (journals,
checkpoints).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import DamagedFile, InputError
from . import remote
from .atomic import make_folders, sweep_siblings, sync, write_atomic, writing
from .links import open_file, real_root, refuse_links, refuse_links_in
from .locks import locked
from .manifest import LARGEST, one_line

logger = logging.getLogger(__name__)


class StoreFiles:
    """Files below one root. Holds no state but the root, so it may be opened and pickled freely."""

    def __init__(self, root: str | Path) -> None:
        """Raises InputError if no file system opens the root, or it is a dangling link."""
        self.root = str(root)
        self.fs, base = remote.open_file_system(self.root)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        # Links in the root itself are resolved here, once. Links below it are refused.
        self.base = str(real_root(base)) if self.is_local else base.rstrip("/")

    # --- paths ---

    def safe_path(self, path: str) -> str:
        """The full path of a file below the root.

        Raises:
            InputError: the path leaves the store by `..`, or a component is a symbolic link.
        """
        if ".." in path.split("/"):
            raise InputError(
                f"store {self.root}: {path} leads out of it; put a copy in its place, or mend the "
                "manifest that names it"
            )
        if self.is_local:
            refuse_links(Path(self.base), path)
        return f"{self.base}/{path}"

    def url(self, path: str) -> str:
        """The safe path, with its protocol if the store is remote."""
        full = self.safe_path(path)
        return full if self.is_local else self.fs.unstrip_protocol(full)

    def local_root(self) -> Path:
        """The local folder for files that are not tables (journals, checkpoints, reports): the
        store's own root, or for a remote store a folder below $TRACE_OPD_LOCAL.

        Raises:
            InputError: the store is remote and $TRACE_OPD_LOCAL is not set.
        """
        root = self._local_root()
        if root is None:
            raise InputError(
                f"store {self.root}: journals, checkpoints and reports need a local folder; set "
                "TRACE_OPD_LOCAL to one that outlives this run"
            )
        return root

    def _local_root(self) -> Path | None:
        if self.is_local:
            return Path(self.base)
        folder = os.environ.get("TRACE_OPD_LOCAL")
        if not folder:
            return None
        url = self.fs.unstrip_protocol(self.base).replace("://", "/").lstrip("/")
        return real_root(Path(folder).resolve() / url)

    def local_path(self, path: str) -> Path:
        """A file or folder below `local_root`.

        Neither a component of the path nor anything in the folder is a symbolic link, so callers
        may follow paths below it.

        Raises:
            InputError: there is no local root, the path leaves the store, or there is a link.
        """
        self.safe_path(path)
        root = self.local_root()
        refuse_links(root, path)
        refuse_links_in(root / path)
        return root / path

    def local_folders(self, stage: str, name: str) -> list[Path]:
        """The local folders `<stage>/*/<name>` of all datasets, finished or not. Folders that hold
        links are logged and skipped."""
        found = []
        for path in sorted(self.local_root().glob(f"{stage}/*/{name}")):
            try:
                found.append(self.local_path(f"{stage}/{path.parent.name}/{name}"))
            except InputError as error:
                logger.warning("%s", error)
        return found

    # --- reading ---

    def exists(self, path: str) -> bool:
        return self.fs.exists(self.safe_path(path))

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the entries of a folder; [] if there is no such folder.

        Raises:
            InputError: the folder is a symbolic link.
        """
        path = self.safe_path(folder).rstrip("/")
        try:
            if self.is_local:
                return sorted(os.listdir(path))  # noqa: PTH208 - names alone
            return sorted(entry.rsplit("/", 1)[1] for entry in self.fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, path: str) -> Any:
        """A file open for reading bytes.

        Raises:
            InputError: it is gone, or a link; DamagedFile: it is not a regular file.
        """
        try:
            if self.is_local:
                return open_file(Path(self.base), path)
            return self.fs.open(self.safe_path(path), "rb")
        except FileNotFoundError:
            raise InputError(
                f"{self.url(path)}: file is gone; `trace-opd verify-store` says how to make it "
                "again"
            ) from None

    def read(self, path: str) -> bytes | None:
        """A small file (up to `manifest.LARGEST`), read by one request; None if it is absent.

        Raises:
            DamagedFile: it is not a regular file, or can't be read.
        """
        try:
            if not self.is_local:
                return self.fs.cat_file(self.safe_path(path))
            with open_file(Path(self.base), path) as file:
                return file.read(LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if not self.is_local:
                raise
            raise DamagedFile(
                f"{self.url(path)}: can't be read ({error.strerror}); make it readable, or restore "
                "it"
            ) from None

    def checksum(self, path: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file."""
        digest, size = hashlib.sha256(), 0
        with self.open(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def damaged(self, path: str, reason: object, mend: str) -> DamagedFile:
        """The error for a file whose content fails a check."""
        text = " ".join(one_line(str(reason)).split())[:200]
        return DamagedFile(f"{self.url(path)}: does not hold what was written ({text}); {mend}")

    # --- writing ---

    def require_writable(self) -> None:
        """Raises InputError if a local root can't be written. Writes nothing."""
        if not self.is_local:
            return
        root = Path(self.base)
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"store {self.root}: {nearest} is not a writable folder; pass --store with "
                "another path"
            )

    def write(self, path: str, content: bytes) -> None:
        """Write a file atomically; in a local store it is durable when this returns.

        Raises:
            InputError: the disk is full, or the path is not writable.
        """
        target = self.safe_path(path)
        if self.is_local:
            write_atomic(Path(target), content, Path(self.base))
        else:
            remote.put(self.fs, target, content)

    def create(self, path: str, content: bytes) -> bool:
        """Write a file of a remote store unless it exists; False if it does (`remote.put_new`)."""
        return remote.put_new(self.fs, self.safe_path(path), content)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, as_json(value))

    def update(self, path: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a small file by `change` of its content (None if it is absent).

        Concurrent updates are not lost in a local store (lock) or on S3 (conditional writes); on
        other file systems the last writer wins.
        """
        with self.locked(path):
            if not self.is_local:
                remote.update(self.fs, self.safe_path(path), change)
                return
            self.write(path, change(self.read(path)))
            sweep_siblings(Path(self.base, path))

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError), writing(path):
            self.fs.rm_file(self.safe_path(path))

    def sync(self, folder: str, names: Iterable[str] = ()) -> None:
        """Make a folder's names, and the content of some of its files, durable: their writer may
        have been killed before its own sync. Local stores only."""
        path = Path(self.safe_path(folder))
        if not self.is_local or not path.is_dir():
            return
        with writing(path):
            for file in (path / name for name in names):
                sync(file)
                sync(file.parent)
                make_folders(file.parent, Path(self.base))
            make_folders(path, Path(self.base))
            sync(path)

    def upload(self, folder: str, names: Sequence[str]) -> None:
        """Copy files of a local folder into a remote store. A local store has them already."""
        if names and not self.is_local:
            remote.upload(self.fs, self.local_path(folder), names, self.safe_path(folder))

    def download(self, folder: str, names: Sequence[str]) -> None:
        """Copy files of a remote store into a local folder, which appears atomically.

        Raises:
            InputError: a name leaves the store.
        """
        for name in names:  # a manifest may be forged
            self.safe_path(f"{folder}/{name}")
        remote.download(self.fs, self.safe_path(folder), names, self.local_path(folder))

    # --- locks ---

    def locked(
        self, name: str, waits: Callable[[str], None] | None = None, shared: bool = False
    ) -> AbstractContextManager[None]:
        """Hold a name exclusively, or shared (`locks.locked`).

        For a remote store the lock covers the processes that share $TRACE_OPD_LOCAL; without that
        variable there is no lock.
        """
        root = self._local_root()
        return nullcontext() if root is None else locked(root, name, waits, shared)


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
