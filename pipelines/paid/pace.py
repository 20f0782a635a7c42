"""How fast to ask an endpoint: requests and tokens per minute, adaptive concurrency, cool-down,
circuit breaker. requests.py sends every request through it, so closing the pace stops sending.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_CUT = 0.75  # factor on the concurrency when the endpoint is overloaded
_SUCCESSES_PER_STEP = 25  # before one more request may be in flight
_COOL_DOWN_S, _LONGEST_COOL_DOWN_S = 1.0, 60.0
_TRIP = 3  # failed rounds in a row, after which one request at a time probes the endpoint


class Closed(Exception):
    """The pace was closed while a request waited, which must not be sent."""


class AskedToWait(Exception):
    """The endpoint asks for a longer wait than `patience_s`."""


class Pace:
    """Shared by all requests to one endpoint, within one event loop."""

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        patience_s: float = math.inf,
    ) -> None:
        """patience_s: the longest wait that the endpoint may ask for."""
        self._most = concurrency
        self._limit = concurrency
        self._in_flight = self._sent = 0  # requests with a slot, and those of them that were sent
        self._successes = 0
        self._failed_rounds = 0
        self._failing_since: float | None = None
        self._last_round = self._resume_at = self._asked_until = 0.0
        self._patience_s = patience_s
        self._changed = asyncio.Condition()
        self._closed = asyncio.Event()
        self._requests = _Rate(requests_per_minute) if requests_per_minute is not None else None
        self._tokens = _Rate(tokens_per_minute) if tokens_per_minute is not None else None

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return self._sent

    @property
    def broken(self) -> bool:
        """Whether the circuit is broken: several rounds of failures without a success."""
        return self._failed_rounds >= _TRIP

    @property
    def limit(self) -> int:
        """Most requests in flight now; one while the circuit is broken."""
        return 1 if self.broken else self._limit

    @property
    def failing_s(self) -> float:
        """Seconds since the first failure after the last success."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Raise Closed in all that waits here; requests in flight go on."""
        self._closed.set()

    def reopen(self) -> None:
        self._closed.clear()

    async def sleep(self, seconds: float) -> None:
        """Raises Closed once the pace is closed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
        if self.closed:
            raise Closed

    @asynccontextmanager
    async def slot(self, tokens: float = 0.0) -> AsyncIterator[float]:
        """Wait for room, both rates and the end of a cool-down. Yields the time of entry.

        tokens: the most that the request may use; `succeeded` gives back the rest.

        Raises:
            Closed: the pace was closed.
            AskedToWait: `hold` is longer than `patience_s`.
        """
        await self._enter()
        try:
            for rate, amount in ((self._requests, 1.0), (self._tokens, tokens)):
                if rate is not None:
                    await self._take(rate, amount)
            if self.closed:
                raise Closed
            self._sent += 1
            try:
                yield time.monotonic()
            finally:
                self._sent -= 1
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def succeeded(self, unused_tokens: float = 0.0) -> None:
        self._failing_since = None
        self._failed_rounds = 0
        self._successes += 1
        if self._successes >= _SUCCESSES_PER_STEP:
            self._successes = 0
            self._limit = min(self._most, self._limit + 1)
        if self._tokens is not None:
            self._tokens.take(-unused_tokens)

    def failed(
        self, entered: float, retry_after_s: float | None = None, overloaded: bool = False
    ) -> None:
        """A failure that may pass. Its tokens stay taken: endpoints count refused requests too.

        overloaded: the endpoint has too many requests: fewer from now on, after a cool-down. Other
        failures (a server that is down) cool down once the circuit is broken. Requests that were
        sent before the last failure belong to the same round and don't count again.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if entered > self._last_round:
            self._last_round = now
            self._successes = 0
            self._failed_rounds += 1
            if overloaded:
                self._limit = max(1, int(self._limit * _CUT))
        if retry_after_s is not None:
            self.hold(retry_after_s)
        elif overloaded or self.broken:
            doublings = self._failed_rounds - (1 if overloaded else _TRIP)
            pause = min(_LONGEST_COOL_DOWN_S, _COOL_DOWN_S * 2.0**doublings)
            self._resume_at = max(self._resume_at, now + pause)

    def hold(self, seconds: float) -> None:
        """Send nothing for the time that the endpoint asks for."""
        self._asked_until = max(self._asked_until, time.monotonic() + seconds)

    async def _enter(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._in_flight < self.limit)
                self._changed.notify()  # there may be room for several
                asked = self._asked_until - time.monotonic()
                if asked > self._patience_s:
                    raise AskedToWait(f"{asked:.0f} s")
                pause = max(asked, self._resume_at - time.monotonic())
                if pause <= 0:
                    self._in_flight += 1
                    return
            await self.sleep(pause)

    async def _take(self, rate: "_Rate", amount: float) -> None:
        async with rate.turn:  # in order of arrival
            while (wait := rate.wait_s(amount)) > 0:
                await self.sleep(wait)
            rate.take(amount)


class _Rate:
    """An amount per minute, spread evenly: at most one second's unused amount is saved.

    More would let a minute's amount go out in one burst. A request for more than a second's amount
    waits until a second is saved, and the next one waits longer. (aiolimiter refuses such a request
    and can't take an amount back.)
    """

    def __init__(self, per_minute: float) -> None:
        self.turn = asyncio.Lock()
        self._per_s = per_minute / 60
        self._saved_s = max(1.0, 1 / self._per_s)
        self._used_until = 0.0

    def wait_s(self, amount: float) -> float:
        now = time.monotonic()
        self._used_until = max(self._used_until, now - self._saved_s)
        return self._used_until + min(amount / self._per_s, self._saved_s) - now

    def take(self, amount: float) -> None:
        """A negative amount gives back."""
        self._used_until += amount / self._per_s
