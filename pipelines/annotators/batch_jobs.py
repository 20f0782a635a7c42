"""Jobs of the Batch API on disk, and the table of those that are out (`trace-opd batches`).

A job is a JSON file, written before each step that costs something: a process that is killed at any
moment finds what it has submitted, and submits nothing twice. Called by openai_batch.py, the
estimate and the command line.
"""

import json
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from ...data.store_files import StoreFiles
from ...schemas.configs import OpenAIAnnotator
from ..paid.budget import Reservation
from ..paid.prices import most_tokens

MOST_BYTES = 200_000_000  # of one file of requests; the API's own limit
FINAL = ("completed", "failed", "expired", "cancelled")
URL = "/v1/chat/completions"


class Job(BaseModel):
    """One batch.

    refused: parameters that its requests go without. status: the last one known; collected when its
    answers are in the journal.
    """

    base_url: str
    api_key_env: str | None
    requests: int
    worst_case_usd: float
    refused: list[str]
    created_at: str
    input_file_id: str | None = None
    batch_id: str | None = None
    status: str = "written"
    completed: int = 0


class JobFile:
    """A job's file, next to the file of its requests until they are collected."""

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        self.reservation: Reservation | None = None  # of the budget, while the answers are out

    @property
    def requests_path(self) -> Path:
        return self.path.with_suffix(".jsonl")

    @cached_property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The most prompt and completion tokens of each request, by its key."""
        if not self.requests_path.exists():  # submitted by a version that removed it
            return {}
        with self.requests_path.open("rb") as lines:
            requests = map(json.loads, lines)
            return {line["custom_id"]: most_tokens(line["body"]) for line in requests}

    def collected(self, answers: int) -> None:
        """Its answers are in the journal."""
        self.update(status="collected", completed=answers)
        self.requests_path.unlink(missing_ok=True)

    def update(self, **changes: Any) -> None:
        """Change fields; on disk before this returns."""
        self.job = self.job.model_copy(update=changes)
        StoreFiles(self.path.parent).write_json(self.path.name, self.job.model_dump())


class RequestFile:
    """A file of requests in the making: one per line, none twice."""

    def __init__(self, folder: Path, config: OpenAIAnnotator, refused: Collection[str]) -> None:
        self._config, self._refused = config, sorted(refused)
        self._path = folder / f"{uuid.uuid4().hex}.jsonl"
        self._file: IO[bytes] = self._path.open("xb")
        self._bytes = self.requests = 0
        self.worst_case_usd = 0.0

    def add(self, key: str, body: dict[str, Any], worst_case_usd: float) -> bool:
        """Write a request; False if the file is full."""
        line = {"custom_id": key, "method": "POST", "url": URL, "body": body}
        raw = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        full = self.requests >= self._config.batch_requests or self._bytes + len(raw) > MOST_BYTES
        if full and self.requests:
            return False
        self._file.write(raw)
        self._bytes += len(raw)
        self.requests += 1
        self.worst_case_usd += worst_case_usd
        return True

    def close(self) -> JobFile | None:
        """The job to submit, None if there is no request in it."""
        self._file.close()
        if not self.requests:
            self._path.unlink()
            return None
        job = Job(
            base_url=self._config.base_url,
            api_key_env=self._config.api_key_env,
            requests=self.requests,
            worst_case_usd=self.worst_case_usd,
            refused=self._refused,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        file = JobFile(self._path.with_suffix(".json"), job)
        file.update()
        return file


def read_jobs(folder: Path) -> list[JobFile]:
    """The jobs of a folder whose answers are not in the journal yet, oldest first."""
    files = [
        JobFile(path, Job.model_validate_json(path.read_text())) for path in folder.glob("*.json")
    ]
    waiting = [file for file in files if file.job.status != "collected"]
    return sorted(waiting, key=lambda file: (file.job.created_at, file.path.name))


def remove_unfinished(folder: Path) -> None:
    """Remove files of requests that a kill has left without an open job."""
    open_jobs = {file.requests_path for file in read_jobs(folder)}
    for path in set(folder.glob("*.jsonl")) - open_jobs:
        path.unlink()
