"""The journal of paid answers. requests.py and openai_batch.py write it; the estimate reads it.

An answer is durable in the journal before it counts, under a key of everything that decides it, so
a killed stage pays for nothing twice. Each process appends to a file of its own. Writers therefore
need no lock, and a torn line is always the last of its file. Damage costs only the lines that it
touches. docs/decisions/paid-journal.md compares this with SQLite.
"""

import asyncio
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ...data.atomic import sync
from ...data.store import content_hash
from ...schemas.errors import InputError
from .claims import Claims
from .journal_lines import (
    Answered,
    Line,
    Record,
    Reserved,
    Settled,
    Unanswered,
    journal_files,
    read_line,
    read_lines,
    write_line,
)

logger = logging.getLogger(__name__)

_GATHER_S = 0.002  # a waiting task sends nothing meanwhile


def request_key(
    base_url: str,
    model: str,
    messages: list[dict[str, str]],
    schema: dict[str, Any] | None,
    sampling: dict[str, Any],
    prompt_version: str,
    sample_index: int = 0,
) -> str:
    """SHA-256 of everything that decides an answer; another model or endpoint gives another key."""
    return content_hash(locals(), length=64)


class Journal:
    """Answers by key in a folder. Memory holds file offsets, not answers.

    elsewhere: lists the folders of other journals, which are read but never written.
    readable: whether the caller can use a record; others are skipped.
    claims: shared with the other processes that write these journals; closed with this journal.
    """

    def __init__(
        self,
        folder: Path,
        elsewhere: Callable[[], Iterable[Path]] = lambda: (),
        readable: Callable[[Record], bool] = lambda record: True,
        claims: Claims | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._elsewhere, self._readable = folder, elsewhere, readable
        self.claims = claims
        self._offsets: dict[str, tuple[Path, int]] = {}  # by key
        self._indexed: dict[
            str, tuple[int, int]
        ] = {}  # by file: end of the index, size at the time
        self._indexing, self._writing = threading.Lock(), threading.Lock()
        self._path: Path | None = None
        self._file: FileIO | None = None
        if claims is not None:
            claims.changed()  # resets it: a line written during the first index counts as a change
        self._index(*elsewhere(), folder)

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Record | None:
        """The record of a key, including what other processes have written by now.

        Without claims only this folder is indexed again.
        """
        if key not in self._offsets:
            with self._indexing:
                if self.claims is None:
                    self._index(self._folder)
                elif self.claims.changed():
                    self._index(*self._elsewhere(), self._folder)
        if key not in self._offsets:
            return None
        path, offset = self._offsets[key]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                line = read_line(file.readline())
        except OSError as error:  # the other dataset may have been removed
            logger.warning("%s: a journalled answer is gone (%s)", path, error.strerror)
            return None
        return line.record if isinstance(line, Answered) and line.key == key else None

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines in this order and return when they are durable. Thread-safe.

        Raises:
            InputError: the file system refuses them.
        """
        if not lines:
            return
        encoded = [write_line(line) for line in lines]
        with self._writing:
            try:
                path, file = self._opened()
                offset = file.tell()
                left = memoryview(b"".join(encoded))
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                self._file = None  # its last line may be torn, so continue in a new file
                raise InputError(
                    f"{self._folder}: answers can't be written ({error.strerror}), so no more are "
                    "requested; make room and run again"
                ) from error
            for line, raw in zip(lines, encoded, strict=True):
                if isinstance(line, Answered):
                    self._offsets[line.key] = (path, offset)
                offset += len(raw)
            if self.claims is not None and any(isinstance(line, Answered) for line in lines):
                self.claims.announce()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.claims is not None:
            self.claims.close()

    def _opened(self) -> tuple[Path, FileIO]:
        """This journal's own file, created with the first line."""
        if self._path is None or self._file is None:
            self._path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
            # Unbuffered: a buffer would write what a full disk refused after later lines.
            self._file = self._path.open("xb", buffering=0)
            sync(self._folder)  # without it a power loss may remove the file's name
        return self._path, self._file

    def _index(self, *folders: Path) -> None:
        """Index what others have appended; one `stat` per unchanged file."""
        for folder in folders:
            with suppress(FileNotFoundError):  # a dataset may be removed at any time
                for entry in journal_files(folder):
                    end, size = self._indexed.get(entry.path, (0, 0))
                    if entry.path != str(self._path) and (now := entry.stat().st_size) != size:
                        self._indexed[entry.path] = self._index_file(Path(entry.path), end), now

    def _index_file(self, path: Path, offset: int) -> int:
        """Index a file's lines from a byte offset on; returns the end of the last complete line."""
        skipped = 0
        for start, end, line in read_lines(path, offset):
            if isinstance(line, Answered) and self._readable(line.record):
                self._offsets[line.key] = (path, start)
            elif line is None or isinstance(line, Answered):
                skipped += 1
            offset = end
        if skipped:
            logger.warning("%s: skipped %d damaged lines", path, skipped)
        return offset


class GroupCommit:
    """Appends to a journal for the tasks of one event loop, with one fsync for all waiting lines.

    The first task waits `_GATHER_S` for others. A thread and an fsync per line would cost more CPU
    than everything else about an answer except sending the request.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[Line] = []
        self._writing = asyncio.Lock()
        self._failure: InputError | None = None
        self._names = (f"{uuid.uuid4().hex[:16]}-{number}" for number in itertools.count())

    async def append(self, key: str, record: Record, settles: str | None = None) -> None:
        """Return when the record is durable. settles: name of its request's reservation.

        Raises:
            InputError: this line or an earlier one could not be written.
        """
        self._waiting.append(Answered(key, record))
        if settles is not None:
            self.settle(settles)
        await self._written()

    async def reserve(self, usd: float) -> str:
        """Return the name of a new reservation when it is durable.

        Raises:
            InputError: as `append`.
        """
        name = next(self._names)
        self._waiting.append(Reserved(name, usd))
        await self._written()
        return name

    def settle(self, name: str) -> None:
        """Release a reservation. It counts until the next lines are written."""
        self._waiting.append(Settled(name))

    def unanswered(self, line: Unanswered) -> None:
        """Note a request without an answer. It is written with the next lines."""
        self._waiting.append(line)

    def close(self) -> None:
        """Write what still waits."""
        lines, self._waiting = self._waiting, []
        if self._failure is None:
            self._append(lines)

    def _append(self, lines: list[Line]) -> None:
        # Answers first: a torn write then counts too much money, never too little.
        self._journal.append(sorted(lines, key=lambda line: not isinstance(line, Answered)))

    async def _written(self) -> None:
        lines = self._waiting
        async with self._writing:
            if lines is self._waiting:  # else another task has written them meanwhile
                await asyncio.sleep(_GATHER_S)
                self._waiting = []
                try:
                    await asyncio.to_thread(self._append, lines)
                except InputError as error:
                    self._failure = error
            if self._failure is not None:
                raise self._failure
