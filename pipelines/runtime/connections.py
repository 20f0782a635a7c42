"""Connections to servers: by aiohttp, or by httpx2 through a proxy. Called by transport.py."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
import yarl

from ...schemas.errors import InputError

_IDLE_S = 5.0  # a connection is kept for another request; httpx2's default
_MOST_HEADER_BYTES = 100 << 10  # a header; aiohttp takes 128 of them at most
# Callers bound the requests in flight; a bound of the pool would only hide the wait.
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


def connections(base_url: str) -> httpx2.AsyncBaseTransport:
    """Sends requests to one endpoint. Answers are as received: not decompressed, of any size.

    Raises:
        InputError: the environment names a proxy that cannot be used.
    """
    proxy = _proxy(base_url)
    if proxy is None:
        return _Connections()
    try:
        return httpx2.AsyncHTTPTransport(_ssl_context(), limits=_LIMITS, proxy=proxy)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{base_url}: the proxy of HTTPS_PROXY or ALL_PROXY cannot be used "
            f"({type(error).__name__}); name an http:// proxy, or add the host to NO_PROXY"
        ) from None


class _Connections(httpx2.AsyncBaseTransport):
    """Connections by aiohttp, which takes a fifth of the CPU of httpx2's own."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._session is None:  # a session needs a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=_ssl_context(), limit=0, keepalive_timeout=_IDLE_S
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # the deadline is in _Transport
                auto_decompress=False,
                max_field_size=_MOST_HEADER_BYTES,
            )
        stream: Any = request.stream
        whole = isinstance(stream, httpx2.ByteStream)
        with _mapped_errors():
            answer = await self._session.request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                data=await request.aread() if whole else stream,  # a batch's file is streamed
                allow_redirects=False,
            )
        return httpx2.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Body(httpx2.AsyncByteStream):
    """The body of an answer before decompression."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _mapped_errors():
            async for part in self._answer.content.iter_any():
                yield part

    async def aclose(self) -> None:
        self._answer.close()  # a connection whose answer was read to its end is kept


@contextlib.contextmanager
def _mapped_errors() -> Iterator[None]:
    """Raise aiohttp's errors as httpx2's. A ConnectError says that nothing was sent."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise httpx2.ConnectError(str(error)) from error
    except (aiohttp.ClientError, ValueError) as error:  # ValueError: a line break in the key
        raise httpx2.RemoteProtocolError(str(error) or type(error).__name__) from error


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
