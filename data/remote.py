"""Stores that are no folder of this machine: S3 and other object stores, any fsspec file system.

Two writers on S3 are kept apart by conditional writes: `put_new` creates (If-None-Match: *), `update`
replaces what it has read (If-Match). docs/reliability.md says what holds on other file systems.
"""

import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec import asyn
from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import InputError
from .files import sync, temporary_name

# Here a file appears with its last byte, and a rename is a copy.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
# Their `pipe_file(mode="create")` is one conditional request.
_CREATE_ATOMICALLY = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_S3 = {"s3", "s3a"}

_TRIES = 100  # of a conditional write; in each round of writers at least one succeeds
_CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 409, 412, 501  # HTTP

logger = logging.getLogger(__name__)


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


def put_new(fs: Any, path: str, content: bytes) -> bool:
    """Create a file unless there is one; False if there is, which stays as it is.

    Atomic on S3, GCS and Azure. On other file systems a check goes before the write, and a writer
    between the two is overwritten.

    Raises:
        InputError: other writers were at it each time.
    """
    if not _is_one_of(fs, _CREATE_ATOMICALLY):
        if fs.exists(path):
            return False
        put_whole(fs, path, content)
        return True

    def put() -> None:
        fs.pipe_file(path, content, mode="create")

    for _ in range(_TRIES):
        if _conditionally(fs, path, content, put):
            return True
        if fs.exists(path):
            return False
        _wait()
    raise _too_busy(path)


def update(fs: Any, path: str, change: Callable[[bytes | None], bytes]) -> None:
    """Replace a small file's content by what `change` makes of it (of None, if there is no file).

    Of two writers at once none is lost on S3: the second reads again what the first wrote. On other
    file systems the last writer wins.

    Raises:
        InputError: other writers were first each time.
    """
    if not _is_one_of(fs, _S3):
        try:
            content = fs.cat_file(path)
        except FileNotFoundError:
            content = None
        put_whole(fs, path, change(content))
        return
    bucket, key, _ = fs.split_path(path)

    def put_over(content: bytes, etag: str) -> Callable[[], None]:
        return lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfMatch=etag)

    for _ in range(_TRIES):
        found = asyn.sync(fs.loop, _read_with_etag, fs, bucket, key)
        if found is None:
            if put_new(fs, path, change(None)):
                return
        else:
            changed = change(found[0])
            with suppress(FileNotFoundError):  # removed meanwhile
                if _conditionally(fs, path, changed, put_over(changed, found[1])):
                    return
        _wait()
    raise _too_busy(path)


async def _read_with_etag(fs: Any, bucket: str, key: str) -> tuple[bytes, str] | None:
    """An object's content and the ETag of that very content: one request."""
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


def _conditionally(fs: Any, path: str, content: bytes, put: Callable[[], None]) -> bool:
    """Whether a conditional write was done; a plain one where the server says that it has none."""
    try:
        put()
    except FileExistsError:
        return False
    except OSError as error:
        status = _http_status(error)
        if status in (_CONFLICT, _PRECONDITION_FAILED):
            return False
        if status != _NOT_IMPLEMENTED:
            raise
        logger.warning(
            "%s: this server has no conditional writes; of two writers at once the last one wins",
            path,
        )
        fs.pipe_file(path, content)
    return True


def _http_status(error: OSError) -> int | None:
    """The status that botocore's error behind this one carries."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _too_busy(path: str) -> InputError:
    return InputError(
        f"{path}: could not be written, other writers were first {_TRIES} times; give the same "
        "command again"
    )


def _wait() -> None:
    time.sleep(random.uniform(0.01, 0.2))  # so that two writers do not meet again


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
    return _is_one_of(fs, _OBJECT_STORES)


def _is_one_of(fs: Any, protocols: set[str]) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return not isinstance(fs, LocalFileSystem) and bool(names & protocols)
