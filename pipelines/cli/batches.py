"""The table of `trace-opd batches`: the state of batches that are out, cancelled on request."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from ...data.store import Store
from ..annotators.batch_client import BatchClient
from ..annotators.batch_jobs import FINAL, JobFile, read_jobs

_ATTEMPTS, _TIMEOUT_S = 3, 30.0


def batches_table(stores: Sequence[Store], cancel: bool) -> Table:
    """A row per batch of `batches_data`, for people."""
    table = Table("dataset", "batch", "status", "answers", "submitted", box=None)
    for one in batches_data(stores, cancel):
        answers = f"{one['answers']}/{one['requests']}"
        cells = (one["dataset"], one["batch"] or "", one["status"], answers, one["submitted_at"])
        table.add_row(*cells)
    return table


def batches_data(stores: Sequence[Store], cancel: bool) -> list[dict[str, Any]]:
    """Each batch whose answers are not in a journal yet, with its endpoint's state of it.

    cancel: cancel those that are not final.

    Raises:
        InputError: a missing key, an endpoint that does not answer.
    """
    found = []
    for dataset, file in _jobs(stores):
        job = file.job
        client = BatchClient(job.base_url, job.api_key_env, _ATTEMPTS, _TIMEOUT_S, _TIMEOUT_S)
        try:
            if job.batch_id is not None:
                client.refresh(file)
                if cancel and file.job.status not in (*FINAL, "cancelling"):
                    client.cancel(file)
        finally:
            client.close()
        found.append(
            {
                "dataset": dataset,
                "batch": job.batch_id,
                "status": file.job.status,
                "answers": file.job.completed,
                "requests": file.job.requests,
                "submitted_at": job.created_at,
            }
        )
    return found


def _jobs(stores: Sequence[Store]) -> Iterator[tuple[str, JobFile]]:
    for store in stores:
        for folder in store.files.local_folders("annotate", "batches"):
            for file in read_jobs(folder):
                yield f"annotate/{folder.parent.name}", file
