"""Paid answers on disk before they count: append-only, one file per process, keyed by the request.

A stage that is killed at any moment finds here what it has paid for. Each process appends to a file
of its own, so annotators running side by side can't tear each other's lines, and a line torn by a
kill is the last one of its file.
"""

import json
import logging
import os
import threading
import uuid
from pathlib import Path
from typing import IO, Any

from ...data.store import content_hash

logger = logging.getLogger(__name__)


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
    """Records by key in a folder. Holds places in files, not records: memory stays small."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        for path in sorted(folder.glob("*.jsonl")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, if there is one."""
        place = self._places.get(key)
        if place is None:
            return None
        path, offset = place
        with path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())["record"]

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Write a record and return when it is on the disk. Any thread may call it."""
        line = json.dumps({"key": key, "record": record}, ensure_ascii=True) + "\n"
        with self._lock:
            file = self._opened()
            offset = file.tell()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            self._places[key] = (Path(file.name), offset)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        """This process's own file, made with its first record."""
        if self._file is None:
            path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
            self._file = path.open("xb")
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # without it a power cut may lose the file's name
            finally:
                os.close(folder)
        return self._file

    def _index(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    self._places[json.loads(line)["key"]] = (path, offset)
                except json.JSONDecodeError:
                    logger.warning("%s: skipped a torn line at byte %d", path, offset)
                offset += len(line)
