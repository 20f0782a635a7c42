"""Paid answers on disk before they count: append-only files, keyed by all that decides an answer.

A stage that is killed at any moment finds here what it has paid for. Each journal appends to a file
of its own, so annotators that run at once, in one process or several, can't tear each other's
lines, and a line torn by a kill is the last one of its file. A key that is not found is searched for
in what the others have written since, so one payment serves all. Lines that hold something else (a
disk's damage, a foreign file) are skipped with a warning.
"""

import asyncio
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from ...data.store import content_hash
from ...schemas.errors import InputError
from .claims import Claims
from .journal_lines import (
    Answered,
    Record,
    Reserved,
    Settled,
    journal_files,
    read_line,
    read_lines,
    write_line,
)

logger = logging.getLogger(__name__)

_GATHER_S = 0.002  # a task that waits sends nothing meanwhile


def request_key(
    base_url: str,
    model: str,
    messages: list[dict[str, str]],
    schema: dict[str, Any] | None,
    sampling: dict[str, Any],
    prompt_version: str,
    sample_index: int = 0,
) -> str:
    """SHA-256 of all that decides an answer; another model or endpoint is another key."""
    return content_hash(
        {
            "base_url": base_url,
            "model": model,
            "messages": messages,
            "schema": schema,
            "sampling": sampling,
            "prompt_version": prompt_version,
            "sample_index": sample_index,
        },
        length=64,
    )


class Journal:
    """Records by key in a folder. Holds places in files, not records: memory stays small.

    elsewhere: lists the folders of other journals, whose records serve too; never written.
    readable: whether a record is one that the caller can use; others are skipped.
    claims: of the annotators that write these journals at once; closed with this one.
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
        self._places: dict[str, tuple[Path, int]] = {}
        # Of the files of others: bytes that are indexed, and the size when they were.
        self._seen: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._file: FileIO | None = None
        if claims is not None:
            claims.news()  # before the first look: what is written during it is news
        self._look(*elsewhere(), folder)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Record | None:
        """The record of a key, if a journal has one by now and it is still there.

        Without claims only this folder is searched again.
        """
        place = self._places.get(key)
        if place is None:
            with self._lock:
                if self.claims is None:
                    self._look(self._folder)
                elif self.claims.news():
                    self._look(*self._elsewhere(), self._folder)
            place = self._places.get(key)
        if place is None:
            return None
        path, offset = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                line = read_line(file.readline())
        except OSError as error:  # another dataset's journal may be removed at any time
            logger.warning("%s: an answer that was there is gone (%s)", path, error.strerror)
            return None
        return line.record if isinstance(line, Answered) and line.key == key else None

    def append(
        self, records: Sequence[tuple[str, Record]], notes: Sequence[Reserved | Settled] = ()
    ) -> None:
        """Write records by key, then notes; return when all are on the disk. Any thread may call it.

        Raises:
            InputError: they can't be written.
        """
        if not records and not notes:
            return
        lines = [write_line(Answered(key, record)) for key, record in records]
        noted = [write_line(note) for note in notes]
        with self._lock:
            try:
                path, file = self._opened()
                offset = file.tell()
                left = memoryview(b"".join(lines + noted))
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                self._file = None  # its last line may be torn: the next record begins another file
                raise InputError(
                    f"{self._folder}: {error.strerror}; answers can't be kept there, so no more are "
                    "asked for: make room and run again"
                ) from error
            for (key, _), line in zip(records, lines, strict=True):
                self._places[key] = (path, offset)
                offset += len(line)
            if self.claims is not None and records:
                self.claims.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.claims is not None:
            self.claims.close()

    def _opened(self) -> tuple[Path, FileIO]:
        """This journal's own file, made with its first record."""
        if self._path is None or self._file is None:
            self._path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
            # Unbuffered: what a full disk didn't take must not follow later, after other lines.
            self._file = self._path.open("xb", buffering=0)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # without it a power cut may lose the file's name
            finally:
                os.close(folder)
        return self._path, self._file

    def _look(self, *folders: Path) -> None:
        """Index what others have written since the last look; one stat per file if that is nothing."""
        own = str(self._path)
        for folder in folders:
            with suppress(FileNotFoundError):  # a dataset may be removed at any time
                for entry in journal_files(folder):
                    if entry.path == own:
                        continue
                    indexed, size = self._seen.get(entry.path, (0, 0))
                    if (now := entry.stat().st_size) != size:
                        self._seen[entry.path] = self._index(Path(entry.path), indexed), now

    def _index(self, path: Path, offset: int) -> int:
        """Index the lines from a byte on; returns where they end."""
        skipped = 0
        for start, end, line in read_lines(path, offset):
            if isinstance(line, Answered) and self._readable(line.record):
                self._places[line.key] = (path, start)
            elif line is None or isinstance(line, Answered):
                skipped += 1
            offset = end
        if skipped:
            logger.warning("%s: skipped %d lines that hold no answer", path, skipped)
        return offset


class GroupCommit:
    """Appends to a journal for the tasks of one event loop: one fsync for all lines that wait.

    The first one waits a little for others: a thread and an fsync for each would cost more CPU than
    all else that is done for an answer but sending the request.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting = _Batch()
        self._writing = asyncio.Lock()
        self._failure: InputError | None = None
        self._names = (f"{uuid.uuid4().hex[:16]}-{number}" for number in itertools.count())

    async def append(self, key: str, record: Record, settles: str | None = None) -> None:
        """Return when the record is on the disk. settles: the reservation of its request.

        Raises:
            InputError: it, or a line before it, couldn't be written.
        """
        self._waiting.records.append((key, record))
        if settles is not None:
            self.settle(settles)
        await self._written()

    async def reserve(self, usd: float) -> str:
        """Return a new reservation's name when it is on the disk.

        Raises:
            InputError: as `append`.
        """
        name = next(self._names)
        self._waiting.notes.append(Reserved(name, usd))
        await self._written()
        return name

    def settle(self, name: str) -> None:
        """A request was surely not billed. Written with the next lines: until then it counts."""
        self._waiting.notes.append(Settled(name))

    def close(self) -> None:
        """Write what still waits."""
        batch, self._waiting = self._waiting, _Batch()
        if self._failure is None:
            self._journal.append(batch.records, batch.notes)

    async def _written(self) -> None:
        batch = self._waiting
        async with self._writing:
            if batch is self._waiting:  # no one wrote it meanwhile: write for all who joined
                await asyncio.sleep(_GATHER_S)
                self._waiting = _Batch()
                try:
                    await asyncio.to_thread(self._journal.append, batch.records, batch.notes)
                except InputError as error:
                    self._failure = error
            if self._failure is not None:
                raise self._failure


@dataclass(frozen=True)
class _Batch:
    """Lines that are written together, records first: a tear then counts too much, never too little."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    notes: list[Reserved | Settled] = field(default_factory=list)
