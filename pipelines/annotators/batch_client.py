"""The calls of OpenAI's Batch API (https://platform.openai.com/docs/guides/batch), with retries.

Called by openai_batch.py, and by `trace-opd batches`. Bodies are read leniently: what is
answered is paid for.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
from pydantic import BaseModel
from tenacity import Retrying, retry_if_exception

from ...schemas.errors import InputError
from .. import endpoint, transport
from ..paid.completion import checked_body
from .batch_jobs import URL, Job, JobFile

_TRANSFER_S = 3600.0  # for a file of requests or results
_MOST_RESULT_BYTES = 4 << 30
_MOST_PAGES = 1000  # of a list of batches, 100 each
_T = TypeVar("_T")


class RequestFailed(Exception):
    """One request of a batch has an error in place of an answer, or an answer that can't be kept.

    billed: it was answered. passing: another attempt may succeed. kind: see
    `endpoint.failure_kind`.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        billed: bool = False,
        passing: bool = False,
        kind: str = "unparsable",
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.billed, self.passing = message, param, billed, passing
        self.kind = kind


class _Counts(BaseModel):
    completed: int = 0


class _Fault(BaseModel):
    message: str | None = None
    param: str | None = None


class _Faults(BaseModel):
    data: list[_Fault] | None = None


class Batch(BaseModel):
    """The part of a batch's state that is read."""

    id: str
    status: str
    created_at: int
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    completed_at: int | None = None
    expired_at: int | None = None
    cancelled_at: int | None = None
    request_counts: _Counts | None = None
    errors: _Faults | None = None


class _Batches(BaseModel):
    data: list[Batch]
    has_more: bool | None = None


class _File(BaseModel):
    id: str


class _Response(BaseModel):
    status_code: int
    body: Any = None


class _Refusal(BaseModel):
    error: _Fault | None = None


class _Outcome(BaseModel):
    custom_id: str
    response: _Response | None = None
    error: _Fault | None = None


class BatchClient:
    """The API's calls, each tried again where that can help."""

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None,
        attempts: int,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """timeout_s: of a request. patience_s: the longest wait that the endpoint may ask for."""
        self._key = endpoint.read_key(api_key_env, "annotator.api_key_env")
        self._base_url, self._attempts, self._patience_s = base_url, attempts, patience_s
        self._client = transport.sync_client(base_url, self._key, timeout_s)
        # Raw: the client takes any JSON or text for a batch.
        self._batches = self._client.batches.with_raw_response
        self._files = transport.sync_client(base_url, self._key, _TRANSFER_S, _MOST_RESULT_BYTES)

    def submit(self, file: JobFile) -> None:
        """Upload a job's requests and create its batch, from the step that it has reached."""
        if file.job.input_file_id is None:
            uploaded = self._try(lambda: self._uploaded(file.requests_path))
            file.update(input_file_id=uploaded, status="uploaded")
        if file.job.batch_id is None:
            batch = self._try(lambda: self._created(file.job))
            file.update(batch_id=batch.id, status=batch.status)

    def refresh(self, file: JobFile) -> Batch:
        """The batch's state, written to the job's file."""
        batch = self._try(lambda: _batch(self._batches.retrieve(_submitted(file))))
        counts = batch.request_counts
        file.update(status=batch.status, completed=counts.completed if counts else 0)
        return batch

    def cancel(self, file: JobFile) -> None:
        """Cancel the batch; answers that it has stay to be collected."""
        batch = self._try(lambda: _batch(self._batches.cancel(_submitted(file))))
        file.update(status=batch.status)

    def results(
        self, file: JobFile, batch: Batch
    ) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
        """Key and journal record, or error, of each request that has an outcome.

        Latency is the batch's: a single answer's is unknown.
        """
        ended = batch.completed_at or batch.expired_at or batch.cancelled_at or batch.created_at
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is None:
                continue
            path = file.path.with_suffix(".results")
            self._try(lambda file_id=file_id, path=path: self._download(file_id, path))
            with path.open("rb") as lines:
                for line in iter(lambda: lines.readline(transport.MOST_BYTES), b""):
                    try:
                        key, outcome = _outcome(line, float(ended - batch.created_at))
                    except endpoint.NotACompletion as error:
                        raise InputError(
                            f"batch interface at {self._base_url}: {self.sentence(error)} in the "
                            f"results of batch {batch.id}; ask its provider, or cancel it"
                        ) from None
                    if self._key is not None and self._key.encode() in line:
                        outcome = RequestFailed("the endpoint sends the API key back", billed=True)
                    yield key, outcome
            path.unlink()

    def sentence(self, error: Exception) -> str:
        """The error in one short line without the key."""
        return endpoint.sentence(error, self._key)

    def fault(self, file: JobFile, batch: Batch) -> str:
        """Why a batch did not complete."""
        reason = ""
        if batch.errors is not None and batch.errors.data:
            error = RequestFailed(batch.errors.data[0].message or "no reason")
            reason = f" ({self.sentence(error)})"
        answers = f"{file.job.completed} of {file.job.requests} answers"
        return f"batch {batch.id} is {batch.status} with {answers}{reason}"

    def close(self) -> None:
        self._client.close()
        self._files.close()

    def _uploaded(self, path: Path) -> str:
        with path.open("rb") as requests:
            create = self._files.files.with_raw_response.create
            raw = create(file=(path.name, requests), purpose="batch")
        return endpoint.read_body(raw.http_response.content, _File).id

    def _download(self, file_id: str, path: Path) -> None:
        with self._files.files.with_streaming_response.content(file_id) as response:
            response.stream_to_file(path)

    def _created(self, job: Job) -> Batch:
        """The batch of the uploaded file: an earlier attempt may have made it and lost the
        reply.
        """
        assert job.input_file_id is not None, "uploaded before"
        after: str | openai.Omit = openai.omit
        for _ in range(_MOST_PAGES):
            raw = self._batches.list(limit=100, after=after)
            listed = endpoint.read_body(raw.http_response.content, _Batches)
            for batch in listed.data:
                if batch.input_file_id == job.input_file_id:
                    return batch
            if not (listed.has_more and listed.data):
                break
            after = listed.data[-1].id
        return _batch(
            self._batches.create(
                input_file_id=job.input_file_id, endpoint=URL, completion_window="24h"
            )
        )

    def _try(self, call: Callable[[], _T]) -> _T:
        retrying = Retrying(
            retry=retry_if_exception(endpoint.may_pass),
            wait=endpoint.wait_s,
            stop=lambda state: (
                state.attempt_number >= self._attempts
                or (endpoint.asked_s(state) or 0.0) > self._patience_s
            ),
            reraise=True,
        )
        try:
            return retrying(call)
        except endpoint.FAILURES as error:
            raise InputError(
                f"batch interface at {self._base_url}: {self.sentence(error)}; mend "
                "that and run again: batches that were submitted go on and are found again"
            ) from None


def _batch(raw: Any) -> Batch:
    return endpoint.read_body(raw.http_response.content, Batch)


def _submitted(file: JobFile) -> str:
    if file.job.batch_id is None:
        raise InputError(
            f"{file.path}: this batch was not submitted; run its annotation again, which submits it"
        )
    return file.job.batch_id


def _outcome(line: bytes, latency_s: float) -> tuple[str, dict[str, Any] | Exception]:
    """Key and journal record, or error, of a line of results.

    Raises:
        NotACompletion: the line is no outcome of a request.
    """
    outcome = endpoint.read_body(line, _Outcome)
    key, response = outcome.custom_id, outcome.response
    if response is None:
        fault = outcome.error or _Fault()
        return key, RequestFailed(fault.message or "no response", passing=True, kind="expired")
    status = response.status_code
    try:
        body = json.dumps(response.body).encode()
        if status == 200:
            return key, {"latency_s": latency_s, "body": checked_body(body), "batched": True}
        fault = endpoint.read_body(body, _Refusal).error or _Fault()
    except endpoint.NotACompletion as error:
        return key, error
    except RecursionError:
        return key, endpoint.NotACompletion("nested too deeply")
    passing = endpoint.status_may_pass(status)
    message, kind = fault.message or f"status {status}", endpoint.status_kind(status)
    return key, RequestFailed(message, fault.param, passing=passing, kind=kind)
