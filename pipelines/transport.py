"""HTTP to servers that are not trusted: clients with limits.

Called by samplers and annotators. Redirects are not followed, a body has a size limit after
decompression, and a complete answer has a deadline (httpx's timeouts are for one read each).
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import anyio
import httpx2
import openai

from .endpoint import NotACompletion, Redirected, status_error
from .runtime.connections import connections
from .runtime.event_loop import EventLoop

# A completion of 100,000 tokens with log-probabilities takes about 15 MB.
MOST_BYTES = 64 << 20
# Headers that are sent with the key. The client adds OPENAI_CUSTOM_HEADERS of the environment,
# which may hold a credential for another server.
_SENT = {
    b"accept", b"accept-encoding", b"connection", b"content-length", b"content-type", b"host",
    b"openai-organization", b"openai-project", b"transfer-encoding", b"user-agent",
}  # fmt: skip


def async_client(
    base_url: str, key: str | None, timeout_s: float, most_bytes: int | None = None
) -> openai.AsyncOpenAI:
    """A client for one endpoint. timeout_s: for each complete answer; most_bytes: its size limit,
    None: MOST_BYTES.

    Raises:
        InputError: the environment names a proxy that cannot be used.
    """
    http = httpx2.AsyncClient(transport=_Transport(base_url, key, most_bytes or MOST_BYTES))
    return openai.AsyncOpenAI(**_options(base_url, key, timeout_s), http_client=http)


class ChatClient:
    """Posts JSON to an endpoint's /chat/completions, with the OpenAI client's headers and errors in
    half of its CPU time."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        """timeout_s: for each complete answer.

        Raises:
            InputError: the environment names a proxy that cannot be used.
        """
        self._transport = _Transport(base_url, key, MOST_BYTES)
        self._url = httpx2.URL(f"{base_url.rstrip('/')}/chat/completions")
        headers = async_client(base_url, key, timeout_s).default_headers.items()
        self._headers = [(n, text) for n, text in headers if n.lower().encode() in _SENT and text]
        self._extensions = {"timeout": httpx2.Timeout(timeout_s).as_dict()}

    async def post(self, body: bytes) -> httpx2.Response:
        """The answer, which has a status of success.

        Raises:
            openai.APIError, NotACompletion, Redirected: there is none.
        """
        request = httpx2.Request(
            "POST", self._url, headers=self._headers, content=body, extensions=self._extensions
        )
        try:
            response = await self._transport.handle_async_request(request)
            response.request = request
            await response.aread()
        except httpx2.TimeoutException as error:
            raise openai.APITimeoutError(request) from error
        except (httpx2.RequestError, ssl.SSLError, anyio.EndOfStream) as error:
            raise openai.APIConnectionError(request=request) from error
        if not response.is_success:
            raise status_error(response)
        return response

    async def close(self) -> None:
        await self._transport.aclose()


def sync_client(
    base_url: str, key: str | None, timeout_s: float, most_bytes: int | None = None
) -> openai.OpenAI:
    """As `async_client`, for callers without an event loop. Each request has its own connection.

    most_bytes: size limit of an answer, for a caller that streams it to disk; None: MOST_BYTES.
    """
    http = httpx2.Client(transport=_SyncTransport(base_url, key, most_bytes or MOST_BYTES))
    return openai.OpenAI(**_options(base_url, key, timeout_s), http_client=http)


def _options(base_url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    return {
        "base_url": base_url,
        "api_key": key or "none",  # without one the client would look for OPENAI_API_KEY
        "timeout": timeout_s,
        "max_retries": 0,  # the client's own retries also repeat an exhausted quota
    }


class _Transport(httpx2.AsyncBaseTransport):
    """Reads each answer to its end."""

    def __init__(self, base_url: str, key: str | None, most_bytes: int) -> None:
        self._inner, self._key = connections(base_url), key
        self._most_bytes = most_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        limit_s = request.extensions["timeout"]["read"]
        parts = _exchange(self._inner, request, self._key, self._most_bytes)
        try:
            async with asyncio.timeout(limit_s), contextlib.aclosing(parts):
                head = await anext(parts)
                body = b"".join([part async for part in parts if isinstance(part, bytes)])
        except TimeoutError:
            raise _too_late(limit_s) from None
        return _response(head, httpx2.ByteStream(body))

    async def aclose(self) -> None:
        await self._inner.aclose()


class _SyncTransport(httpx2.BaseTransport):
    """Runs the asynchronous transport: a blocking socket has no deadline for a series of reads."""

    def __init__(self, base_url: str, key: str | None, most_bytes: int) -> None:
        self._base_url, self._key, self._most_bytes = base_url, key, most_bytes
        connections(base_url)  # raises early if the proxy cannot be used

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        stream = _SyncAnswer(self._base_url, request, self._key, self._most_bytes)
        try:
            return _response(stream.step(), stream)
        except BaseException:
            stream.close()
            raise


class _SyncAnswer(httpx2.SyncByteStream):
    """One answer, in an event loop of its own."""

    def __init__(
        self, base_url: str, request: httpx2.Request, key: str | None, most_bytes: int
    ) -> None:
        self._limit_s = request.extensions["timeout"]["read"]
        self._until = time.monotonic() + self._limit_s
        self._loop = EventLoop()
        self._inner = connections(base_url)
        self._parts = _exchange(self._inner, request, key, most_bytes)

    def step(self) -> Any:
        """The head, then the parts of the body; raises StopAsyncIteration at the end."""
        try:
            return self._loop.run(self._next())
        except TimeoutError:
            raise _too_late(self._limit_s) from None

    def __iter__(self) -> Iterator[bytes]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield self.step()

    def close(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run(self._end())

    async def _next(self) -> Any:
        async with asyncio.timeout(self._until - time.monotonic()):
            return await anext(self._parts)

    async def _end(self) -> None:
        await self._parts.aclose()
        await self._inner.aclose()


async def _exchange(
    inner: httpx2.AsyncBaseTransport, request: httpx2.Request, key: str | None, most_bytes: int
) -> AsyncGenerator[Any]:
    """The head of the answer (Response), then the decompressed parts of its body (bytes).

    Raises:
        Redirected: the server names another address.
        NotACompletion: the body is larger than `most_bytes`.
    """
    headers = [
        (name, value)
        for name, value in request.headers.raw
        if name.lower() in _SENT or name.lower().startswith(b"x-stainless-")
    ]
    if key is not None:
        headers.append((b"Authorization", b"Bearer " + key.encode()))
    sent = httpx2.Request(
        request.method,
        request.url,
        headers=headers,
        stream=request.stream,
        extensions=request.extensions,
    )
    response = await inner.handle_async_request(sent)
    try:
        if response.has_redirect_location:
            raise Redirected(
                f"{response.status_code} to {response.headers['location'][:200]!r}, which is not "
                "followed: prompts and key would go there; set base_url to the endpoint itself"
            )
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = capped = _Capped(response.stream, most_bytes)
        yield response
        if "content-encoding" not in response.headers:
            async with contextlib.aclosing(aiter(capped)) as parts:
                async for part in parts:
                    yield part
            return
        size = 0
        async with contextlib.aclosing(response.aiter_bytes()) as parts:
            async for part in parts:
                size += len(part)
                _check_size(size, most_bytes)
                yield part
    finally:
        await response.aclose()


class _Capped(httpx2.AsyncByteStream):
    """A body before decompression: bytes after the end of a gzip stream never leave the decoder."""

    def __init__(self, stream: httpx2.AsyncByteStream, most_bytes: int) -> None:
        self._stream, self._most_bytes = stream, most_bytes

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            _check_size(size, self._most_bytes)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def _check_size(size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise NotACompletion(f"an answer of more than {most_bytes >> 20} MiB")


def _response(
    head: httpx2.Response, stream: httpx2.AsyncByteStream | httpx2.SyncByteStream
) -> httpx2.Response:
    """The answer with its body after decompression."""
    headers = [
        (name, value)
        for name, value in head.headers.raw
        if name.lower() not in (b"content-encoding", b"content-length", b"transfer-encoding")
    ]
    return httpx2.Response(
        head.status_code, headers=headers, stream=stream, extensions=head.extensions
    )


def _too_late(limit_s: float) -> httpx2.ReadTimeout:
    return httpx2.ReadTimeout(f"no complete answer within {limit_s:g} s")
