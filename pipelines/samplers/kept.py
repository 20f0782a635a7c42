"""Answers of servers for a part that is not written yet, on disk as each arrives.

Stages rollout and evaluate open them around a part, and engine openai reads and adds. A run that
was stopped or killed asks again only for what was in flight. `Draft.finish` removes the folder, as
all temporary names.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.atomic import writing
from ...data.store import Draft, content_hash
from ...schemas.labels import FinishReason
from ...trace.protocols import Completion, Sampler

_FOLDER = ".tmp-answers"


class KeptAnswers:
    """One JSON line per answer, found by the hash of its request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Completion] = {}
        with suppress(FileNotFoundError), path.open("rb") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):  # torn by a kill
                    key, fields = json.loads(line)
                    reason = FinishReason(fields.pop("finish_reason"))
                    self._known[key] = Completion(**fields, finish_reason=reason)
        with writing(path):
            self._file = path.open("ab")
            if self._file.tell():
                self._file.write(b"\n")  # after a torn line

    def __len__(self) -> int:
        return len(self._known)

    def get(self, request: dict[str, Any]) -> Completion | None:
        return self._known.get(content_hash(request))

    def add(self, request: dict[str, Any], answer: Completion) -> None:
        """Raises InputError if the disk is full."""
        key = content_hash(request)
        self._known[key] = answer
        with writing(self._path):
            self._file.write(json.dumps([key, asdict(answer)]).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


@contextmanager
def keeping(sampler: Sampler, draft: Draft, part: int) -> Iterator[None]:
    """Keep a part's answers during the block, if a server samples and the store is local."""
    if not hasattr(sampler, "kept") or not draft.files.is_local:
        yield
        return
    folder = draft.local_path(_FOLDER)
    for path in folder.glob("*.jsonl"):
        if path.stem.isdecimal() and draft.has_part(int(path.stem)):
            path.unlink(missing_ok=True)
    kept = KeptAnswers(folder / f"{part}.jsonl")
    sampler.kept = kept  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sampler.kept = None  # type: ignore[attr-defined]
        kept.close()
