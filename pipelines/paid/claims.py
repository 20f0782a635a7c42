"""Locks on questions in flight, so that processes on one store ask each question once.

`Journal` holds a `Claims`; requests.py claims each question before it asks. A claim locks one
byte of a file, at an offset derived from the question's key. The kernel releases it when its
process ends, so no claim is ever stale. A task holds one claim at a time and waits for none while
it holds one, so there are no deadlocks. The file grows by a byte per write to any journal: an
unchanged size means no new answers.
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
_KEY_DIGITS = 15  # hexadecimal: 60 bits fit a file offset; a collision only makes one wait


class Claims:
    """One process's claims. Open a file once per process: any `close` of it drops its POSIX
    locks.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError: the file can't be opened, or is a link."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with writing(path):
            try:
                self._file: int | None = os.open(path, flags, 0o666)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
                raise InputError(
                    f"{path}: {error.strerror}; remove it, runs share their questions there"
                ) from error
        self._ours = self._theirs = 0

    def changed(self) -> bool:
        """Whether other processes have announced answers since the last call."""
        assert self._file is not None, "open"
        before, self._theirs = self._theirs, os.fstat(self._file).st_size - self._ours
        return self._theirs != before

    def announce(self) -> None:
        """New answers of ours are durable."""
        assert self._file is not None, "open"
        self._ours += os.write(self._file, b"\n")

    @asynccontextmanager
    async def held(
        self, key: str, sleep: Callable[[float], Awaitable[None]], patience_s: float
    ) -> AsyncIterator[None]:
        """Hold a question's claim. Wait while another process holds it, at most `patience_s`: a
        process may be suspended for days."""
        until = time.monotonic() + patience_s
        while not self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB) and time.monotonic() < until:
            await sleep(_POLL_S)
        try:
            yield
        finally:
            self._lock(key, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, key: str, operation: int) -> bool:
        """False if another process holds it. On a file system without locks nothing is shared."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, operation, 1, int(key[:_KEY_DIGITS], 16))
        except OSError as error:
            return error.errno not in _HELD
        return True
