"""Stores that are no folder of this machine: S3 and other object stores, any fsspec file system."""

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import InputError
from .files import sync, temporary_name

# Here a file appears with its last byte, and a rename is a copy.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}


def open_file_system(root: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the root's path on it.

    What it lists is never remembered: other machines write there too.

    Raises:
        InputError: no such protocol, or its package is not installed.
    """
    options = {} if "::" in root else {"use_listings_cache": False}
    try:
        return fsspec.core.url_to_fs(root, **options)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"store {root}: {error}; give a folder or a URL that fsspec can open "
            "(s3:// needs pip install 'trace-opd[s3]')"
        ) from error


def require_reachable(root: str) -> None:
    """Ask a remote store for an answer before any work; nothing to ask of a local one.

    Raises:
        InputError: it doesn't answer, lets nobody in, or there is no such bucket.
    """
    fs, base = open_file_system(root)
    if not _is_object_store(fs):
        return
    bucket = base.lstrip("/").split("/")[0]
    try:
        # A file first: of a bucket s3fs says that it is not there, whatever the reason.
        found = fs.exists(f"{base}/aliases.json") or fs.exists(bucket)
    except Exception as error:  # each file system has exceptions of its own
        said = " ".join(str(error).split())
        raise InputError(
            f"store {root}: {said}; check its URL, the endpoint and the credentials that this "
            "process sees"
        ) from error
    if not found:
        raise InputError(f"store {root}: there is no bucket {bucket}; make it, or name another")


def put_whole(fs: Any, path: str, content: bytes) -> None:
    """Write a file whole or not at all."""
    if _is_object_store(fs):
        fs.pipe_file(path, content)
        return
    temporary = temporary_name(path)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(temporary, "wb") as file:
        file.write(content)
    fs.mv(temporary, path)


def local_side(fs: Any, base: str) -> Path | None:
    """Folder of this machine for what can't lie in a remote store: $TRACE_OPD_LOCAL/<its URL>."""
    folder = os.environ.get("TRACE_OPD_LOCAL")
    if not folder:
        return None
    return Path(folder).resolve() / fs.unstrip_protocol(base).replace("://", "/").lstrip("/")


def upload(fs: Any, folder: Path, names: Iterable[str], base: str) -> None:
    """Copy files of a local folder to the same names below a remote one."""
    for name in names:
        if not _is_object_store(fs):
            fs.makedirs(f"{base}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(folder / name), f"{base}/{name}")


def download(fs: Any, base: str, names: Iterable[str], folder: Path) -> None:
    """Copy files of a remote folder to the same names in a local one, which is there whole or not
    at all."""

    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        for name in names:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{base}/{name}", str(target))
        # The folder's name must not be on the disk before its content.
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        os.replace(temporary, folder)  # noqa: PTH105 - atomic on POSIX
        sync(folder.parent)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_object_store(fs: Any) -> bool:
    protocol = fs.protocol
    names = {protocol} if isinstance(protocol, str) else set(protocol)
    return not isinstance(fs, LocalFileSystem) and bool(names & _OBJECT_STORES)
