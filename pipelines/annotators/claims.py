"""Questions in flight, shared by the annotators that run on one store at once.

A claim is a lock on one byte of a file, at an offset that the question's key gives. The kernel
releases it with its process, however that ends, so no claim is ever stale. A task holds one claim
at a time and waits for none while it holds one, so no two runs can wait for each other.

The file's size counts what has been journalled: if it has not changed, no journal has.
"""

import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from ...data.atomic import writing
from ...schemas.errors import InputError

_POLL_S = 0.05
_HELD = (errno.EAGAIN, errno.EACCES)
_KEY_DIGITS = (
    15  # hexadecimal: 60 bits fit a file's offset, and equal ones only wait for each other
)


class Claims:
    """One process's claims. One object per process and file: POSIX locks end with any `close` of it."""

    def __init__(self, path: Path) -> None:
        """Raises InputError: the file can't be opened, or is a link."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with writing(path):
                self._file: int | None = os.open(path, flags, 0o666)
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; remove it, annotators share their questions there"
            ) from error
        self._ours = self._theirs = 0

    def news(self) -> bool:
        """Whether others have journalled anything since the last call."""
        assert self._file is not None, "open"
        before, self._theirs = self._theirs, os.fstat(self._file).st_size - self._ours
        return self._theirs != before

    def tell(self) -> None:
        """Something new is in our journal, and on the disk."""
        assert self._file is not None, "open"
        self._ours += os.write(self._file, b"\n")

    @asynccontextmanager
    async def held(
        self, key: str, sleep: Callable[[float], Awaitable[None]], patience_s: float
    ) -> AsyncIterator[None]:
        """Hold a question's claim. While another live process holds it, wait, but no longer than
        `patience_s`: a process may be suspended for days."""
        until = time.monotonic() + patience_s
        while not self._try(key) and time.monotonic() < until:
            await sleep(_POLL_S)
        try:
            yield
        finally:
            self._lock(key, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self, key: str) -> bool:
        return self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _lock(self, key: str, operation: int) -> bool:
        """False if another process holds it. A file system without locks shares nothing."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, operation, 1, int(key[:_KEY_DIGITS], 16))
        except OSError as error:
            return error.errno not in _HELD
        return True
