"""HTTP to servers that are not trusted: a transport for the OpenAI client, with limits.

Called by samplers and annotators. Redirects are not followed, a body has a size limit after
decompression, and a complete answer has a deadline (httpx's timeouts are for one read each).
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai

from ..schemas.errors import InputError
from .endpoint import NotACompletion, Redirected
from .runtime.event_loop import EventLoop

# A completion of 100,000 tokens with log-probabilities takes about 15 MB.
MOST_BYTES = 64 << 20
# Headers that are sent with the key. The client adds OPENAI_CUSTOM_HEADERS of the environment,
# which may hold a credential for another server.
_SENT = {
    b"accept", b"accept-encoding", b"connection", b"content-length", b"content-type", b"host",
    b"openai-organization", b"openai-project", b"transfer-encoding", b"user-agent",
}  # fmt: skip
# Callers bound the requests in flight; a bound of the pool would only hide the wait.
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


def async_client(base_url: str, key: str | None, timeout_s: float) -> openai.AsyncOpenAI:
    """A client for one endpoint. timeout_s: for each complete answer.

    Raises:
        InputError: the environment names a proxy that cannot be used.
    """
    http = httpx2.AsyncClient(transport=_Transport(base_url, key))
    return openai.AsyncOpenAI(**_options(base_url, key, timeout_s), http_client=http)


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

    def __init__(self, base_url: str, key: str | None) -> None:
        self._inner, self._key = _connections(base_url), key

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        limit_s = request.extensions["timeout"]["read"]
        parts = _exchange(self._inner, request, self._key, MOST_BYTES)
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
        _connections(base_url)  # raises early if the proxy cannot be used

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
        self._inner = _connections(base_url)
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
        response.stream = _Capped(response.stream, most_bytes)
        yield response
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

    async def __aiter__(self) -> AsyncIterator[bytes]:
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


def _connections(base_url: str) -> httpx2.AsyncHTTPTransport:
    try:
        return httpx2.AsyncHTTPTransport(_ssl_context(), limits=_LIMITS, proxy=_proxy(base_url))
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{base_url}: the proxy of HTTPS_PROXY or ALL_PROXY cannot be used "
            f"({type(error).__name__}); name an http:// proxy, or add the host to NO_PROXY"
        ) from None


@cache
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # takes 40 ms


def _proxy(base_url: str) -> str | None:
    """The environment's proxy for an https endpoint, which sees the host's name and encrypted
    bytes.

    A proxy for plain http would read key and prompts, and the config does not name it.
    """
    parts = urlsplit(base_url)
    if parts.scheme != "https" or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
