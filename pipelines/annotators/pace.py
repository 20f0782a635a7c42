"""How fast to ask an endpoint: request pace, adaptive concurrency, cool-down, circuit breaker."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

_CUT = 0.75  # of the concurrency, when the endpoint says that it is too much
_SUCCESSES_PER_STEP = 25  # before one more request may be in flight
_COOL_DOWN_S, _LONGEST_COOL_DOWN_S = 1.0, 60.0
_TRIP = 3  # rejected rounds in a row, after which one request at a time probes the endpoint


class Pace:
    """Shared by all requests to one endpoint, within one event loop."""

    def __init__(self, concurrency: int, requests_per_minute: float | None) -> None:
        self._most = concurrency
        self._limit = concurrency
        self._in_flight = 0
        self._successes = 0
        self._rejected_rounds = 0
        self._last_cut = self._resume_at = 0.0
        self._changed = asyncio.Condition()
        self._bucket = None
        if requests_per_minute is not None:
            # A bucket of one second's requests: a full minute's would go out in one burst.
            burst = max(1.0, requests_per_minute / 60)
            self._bucket = AsyncLimiter(burst, burst * 60 / requests_per_minute)

    @property
    def limit(self) -> int:
        """Requests that may be in flight now; one while the circuit is broken."""
        return 1 if self._rejected_rounds >= _TRIP else self._limit

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for room, the request pace and the end of a cool-down. Yields the time of entry."""
        await self._enter()
        try:
            if self._bucket is not None:
                await self._bucket.acquire()
            yield time.monotonic()
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        self._rejected_rounds = 0
        self._successes += 1
        if self._successes >= _SUCCESSES_PER_STEP:
            self._successes = 0
            self._limit = min(self._most, self._limit + 1)

    def rejected(self, entered: float, retry_after_s: float | None) -> None:
        """The endpoint is overloaded: fewer requests, none before the cool-down is over.

        Requests that went out before the last cut are of the same round: they don't cut again.
        """
        now = time.monotonic()
        if entered > self._last_cut:
            self._last_cut = now
            self._successes = 0
            self._rejected_rounds += 1
            self._limit = max(1, int(self._limit * _CUT))
        cool_down = retry_after_s
        if cool_down is None:
            doubled = _COOL_DOWN_S * 2 ** (self._rejected_rounds - 1)
            cool_down = min(_LONGEST_COOL_DOWN_S, doubled)
        self._resume_at = max(self._resume_at, now + cool_down)

    async def _enter(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._in_flight < self.limit)
                pause = self._resume_at - time.monotonic()
                if pause <= 0:
                    self._in_flight += 1
                    return
            await asyncio.sleep(pause)
