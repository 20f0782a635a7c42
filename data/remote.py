"""Reads and writes of remote stores: S3 and other object stores, any fsspec file system.

`StoreFiles` calls this for stores that are not on a local disk. Concurrent writers on S3 are kept
apart by conditional writes: `put_new` creates (If-None-Match: *), `update` replaces what it has
read (If-Match). docs/reliability.md says what holds on other file systems.
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

from ..schemas.errors import InputError, shortened
from .atomic import sync, temporary_name

_S3 = {"s3", "s3a"}
# `pipe_file(mode="create")` is one conditional request.
_CREATE_ATOMICALLY = _S3 | {"gs", "gcs", "abfs", "abfss", "az"}
# An upload is atomic, and a rename is a copy.
_OBJECT_STORES = _CREATE_ATOMICALLY | {"oss", "oci"}

_TRIES = 100  # of a conditional write; in each round of writers at least one succeeds
_CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 409, 412, 501  # HTTP

logger = logging.getLogger(__name__)


def open_file_system(root: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the root's path on it.

    Listings are not cached, since other machines write to the store too.

    Raises:
        InputError: an unknown protocol, or its package is not installed.
    """
    options = {} if "::" in root else {"use_listings_cache": False}
    try:
        return fsspec.core.url_to_fs(root, **options)
    except Exception as error:  # each file system has exception types of its own
        raise InputError(
            f"store {shortened(root)}: {shortened(error)}; give a folder or a URL that fsspec can "
            "open (s3:// needs pip install 'trace-opd[s3]')"
        ) from error


def require_reachable(root: str) -> None:
    """Check before any work that an object store answers; other stores are not checked.

    Raises:
        InputError: it doesn't answer, refuses the credentials, or has no such bucket; or a URL of
            a file system that is never written (http).
    """
    fs, base = open_file_system(root)
    if _is_one_of(fs, {"http", "https"}):
        raise InputError(f"store {shortened(root)}: cannot be written; give a folder or s3://…")
    if not _is_one_of(fs, _OBJECT_STORES):
        return
    bucket = base.lstrip("/").split("/")[0]
    try:
        # Ask for a file first: for a bucket s3fs reports every failure as "absent".
        found = fs.exists(f"{base}/aliases.json") or fs.exists(bucket)
    except Exception as error:  # each file system has exception types of its own
        reason = " ".join(str(error).split())
        raise InputError(
            f"store {root}: {reason}; check its URL, the endpoint and the credentials that this "
            "process sees"
        ) from error
    if not found:
        raise InputError(f"store {root}: there is no bucket {bucket}; make it, or name another")


def put(fs: Any, path: str, content: bytes) -> None:
    """Write a file; atomic on object stores and where the file system's rename is."""
    if _is_one_of(fs, _OBJECT_STORES):
        fs.pipe_file(path, content)
        return
    temporary = temporary_name(path)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(temporary, "wb") as file:
        file.write(content)
    fs.mv(temporary, path)


def put_new(fs: Any, path: str, content: bytes) -> bool:
    """Create a file unless it exists; False if it does, and it stays as it is.

    Atomic on S3, GCS and Azure. Other file systems are checked before the write, so a file that
    appears in between is overwritten.

    Raises:
        InputError: other writers were first each time.
    """
    if not _is_one_of(fs, _CREATE_ATOMICALLY):
        if fs.exists(path):
            return False
        put(fs, path, content)
        return True

    def attempt() -> bool | None:
        if _conditionally(fs, path, content, lambda: fs.pipe_file(path, content, mode="create")):
            return True
        return False if fs.exists(path) else None

    return _retried(path, attempt)


def update(fs: Any, path: str, change: Callable[[bytes | None], bytes]) -> None:
    """Replace a small file by `change` of its content (None if it is absent).

    On S3 no concurrent update is lost: the second writer reads the first one's content and tries
    again. On other file systems the last writer wins.

    Raises:
        InputError: other writers were first each time.
    """
    if not _is_one_of(fs, _S3):
        try:
            content = fs.cat_file(path)
        except FileNotFoundError:
            content = None
        put(fs, path, change(content))
        return
    bucket, key, _ = fs.split_path(path)

    def attempt() -> bool | None:
        found = asyn.sync(fs.loop, _read_with_etag, fs, bucket, key)
        if found is None:
            return put_new(fs, path, change(None)) or None
        content, etag = change(found[0]), found[1]
        options = {"Bucket": bucket, "Key": key, "Body": content, "IfMatch": etag}
        with suppress(FileNotFoundError):  # removed since it was read
            if _conditionally(fs, path, content, lambda: fs.call_s3("put_object", **options)):
                return True
        return None

    _retried(path, attempt)


def _retried(path: str, attempt: Callable[[], bool | None]) -> bool:
    """The first result of `attempt` that is not None."""
    for _ in range(_TRIES):
        if (done := attempt()) is not None:
            return done
        time.sleep(random.uniform(0.01, 0.2))  # so that two writers drift apart
    raise InputError(
        f"{path}: could not be written, other writers were first {_TRIES} times; give the same "
        "command again"
    )


async def _read_with_etag(fs: Any, bucket: str, key: str) -> tuple[bytes, str] | None:
    """An object's content and its ETag, by one request."""
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


def _conditionally(fs: Any, path: str, content: bytes, send: Callable[[], object]) -> bool:
    """Whether a conditional write succeeded. A server without such writes gets a plain one."""
    try:
        send()
    except FileExistsError:
        return False
    except OSError as error:
        # botocore's error is the cause of fsspec's.
        response = getattr(error.__cause__, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
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


def upload(fs: Any, folder: Path, names: Iterable[str], base: str) -> None:
    """Copy files of a local folder to the same names below a remote one."""
    for name in names:
        if not _is_one_of(fs, _OBJECT_STORES):
            fs.makedirs(f"{base}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(folder / name), f"{base}/{name}")


def download(fs: Any, base: str, names: Iterable[str], folder: Path) -> None:
    """Copy files of a remote folder to the same names in a local one, which appears atomically."""
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        for name in names:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{base}/{name}", str(target))
        # The content must be durable before the folder's name.
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        os.replace(temporary, folder)  # noqa: PTH105 - atomic on POSIX
        sync(folder.parent)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_one_of(fs: Any, protocols: set[str]) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return not isinstance(fs, LocalFileSystem) and bool(names & protocols)
