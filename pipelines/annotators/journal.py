"""Paid answers on disk before they count: append-only files, keyed by all that decides an answer.

A stage that is killed at any moment finds here what it has paid for. Each journal appends to a file
of its own, so annotators running side by side, in one process or several, can't tear each other's
lines, and a line torn by a kill is the last one of its file. Whoever doesn't find a key looks again
into what the others have written since, so what one has paid for serves all at once.
"""

import asyncio
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from ...data.store import content_hash
from ...schemas.errors import InputError

logger = logging.getLogger(__name__)

# A line begins with its key, so that files are indexed without parsing what they hold.
_START = re.compile(rb'\{"key": ?"([^"\\]+)", ?"record": ?')

_GATHER_S = 0.002  # whoever waits asks nothing meanwhile

Record = dict[str, Any]


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

    elsewhere: folders of other journals, whose records serve too; read once, never written.
    """

    def __init__(self, folder: Path, elsewhere: Iterable[Path] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        # Of the files of others: bytes that are indexed, and the size when they were.
        self._seen: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._file: FileIO | None = None
        for other in (*elsewhere, folder):
            self._look(other)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Record | None:
        """The record of a key, if any journal of this folder has one by now."""
        place = self._places.get(key)
        if place is None:
            with self._lock:
                self._look(self._folder)
            place = self._places.get(key)
        if place is None:
            return None
        path, offset = place
        with path.open("rb") as file:
            file.seek(offset)
            return from_json(file.readline())["record"]

    def append(self, records: Sequence[tuple[str, Record]]) -> None:
        """Write records by key and return when all are on the disk. Any thread may call it.

        Raises:
            InputError: they can't be written.
        """
        if not records:
            return
        lines = [_line(key, record) for key, record in records]
        with self._lock:
            try:
                path, file = self._opened()
                offset = file.tell()
                left = memoryview(b"".join(lines))
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

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

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

    def _look(self, folder: Path) -> None:
        """Index what others have written since the last look; one stat per file if that is nothing."""
        own = str(self._path)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.endswith(".jsonl") or entry.path == own:
                    continue
                indexed, size = self._seen.get(entry.path, (0, 0))
                if (now := entry.stat().st_size) != size:
                    self._seen[entry.path] = self._index(Path(entry.path), indexed), now

    def _index(self, path: Path, offset: int) -> int:
        """Index whole lines from a byte on; returns where they end."""
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written, or torn by a kill
                    break
                if line.endswith(b"}\n") and (start := _START.match(line)):
                    self._places[start[1].decode()] = (path, offset)
                else:
                    logger.warning("%s: skipped a line at byte %d that is no record", path, offset)
                offset += len(line)
        return offset


class GroupCommit:
    """Appends to a journal for the tasks of one event loop: one fsync for all records that wait.

    The first one waits a little for others: a thread and an fsync for each would cost more CPU than
    all else that is done for an answer but sending the request.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[tuple[str, Record]] = []
        self._writing = asyncio.Lock()
        self._failure: InputError | None = None

    async def append(self, key: str, record: Record) -> None:
        """Return when the record is on the disk.

        Raises:
            InputError: it, or one before it, couldn't be written.
        """
        batch = self._waiting
        batch.append((key, record))
        async with self._writing:
            if batch is self._waiting:  # no one wrote it meanwhile: write for all who joined
                await asyncio.sleep(_GATHER_S)
                self._waiting = []
                try:
                    await asyncio.to_thread(self._journal.append, batch)
                except InputError as error:
                    self._failure = error
            if self._failure is not None:
                raise self._failure


def _line(key: str, record: Record) -> bytes:
    return to_json({"key": key, "record": record}) + b"\n"
