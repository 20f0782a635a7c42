"""Load balancing over several servers: which of them gets the next request, and when it is
repeated. Engine openai and the scoring of stage score use it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from .. import endpoint

_UNREACHABLE_ATTEMPTS = 5


def server_failed(error: BaseException | None) -> bool:
    """Whether another server may succeed: this one is unreachable, hung up, or has an error."""
    return isinstance(error, openai.APIConnectionError | openai.InternalServerError)


class Pool:
    """The servers of one call: a request goes to the least busy one that is up.

    A server that failed gets no request while another is up. When none is, all are admitted again.
    """

    def __init__(self, servers: Sequence[str], admit: Callable[[str], None] | None = None) -> None:
        """admit: makes a server ready, in a thread, before its first request and after a failure;
        raises openai.APIConnectionError if it is down. None: all servers are ready.
        """
        self._busy = dict.fromkeys(servers, 0)
        self._admit = admit
        self._up = set(servers) if admit is None else set[str]()
        self._admitting = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return sum(self._busy.values())

    @property
    def up(self) -> frozenset[str]:
        return frozenset(self._up)

    @asynccontextmanager
    async def server(self) -> AsyncIterator[str]:
        """A server for one request; an error of the request may mark it as down.

        Raises:
            openai.APIConnectionError: no server can be admitted.
        """
        if not self._up:
            async with self._admitting:
                if not self._up:
                    self._up = await self._admitted()
        server = min(self._up, key=self._busy.__getitem__)
        self._busy[server] += 1
        try:
            yield server
        except openai.APIError as error:
            if server_failed(error):
                self._up.discard(server)
            raise
        finally:
            self._busy[server] -= 1

    async def _admitted(self) -> set[str]:
        servers = list(self._busy)
        admit = self._admit
        if admit is None:
            return set(servers)

        async def error_of(server: str) -> openai.APIConnectionError | None:
            try:
                await asyncio.to_thread(admit, server)
            except openai.APIConnectionError as error:
                return error
            return None

        errors = dict(zip(servers, await asyncio.gather(*map(error_of, servers)), strict=True))
        admitted = {server for server, error in errors.items() if error is None}
        if not admitted:
            raise next(error for error in errors.values() if error is not None)
        return admitted


def retrying(
    pool: Pool,
    timeout_s: float,
    log: Callable[[RetryCallState], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncRetrying:
    """Repeat a request of the pool after transient failures (rate limits, server and connection
    errors) for `timeout_s`; one that a server failed to answer goes to another server at once.
    """

    def elsewhere(state: RetryCallState) -> bool:
        return bool(pool.up) and server_failed(error_of(state))

    def give_up(state: RetryCallState) -> bool:
        """Whether the next attempt would be after `timeout_s`; earlier if no server is reachable,
        rather than busy.
        """
        if elsewhere(state):
            return False
        absent = isinstance(error_of(state), openai.APIConnectionError)
        if absent and state.attempt_number >= _UNREACHABLE_ATTEMPTS:
            return True
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep >= timeout_s

    return AsyncRetrying(
        retry=retry_if_exception(endpoint.may_pass),
        wait=lambda state: 0.0 if elsewhere(state) else endpoint.wait_s(state),
        stop=give_up,
        before_sleep=log,
        sleep=sleep,
        reraise=True,
    )


def error_of(state: RetryCallState) -> BaseException | None:
    """The error of the last attempt."""
    return state.outcome.exception() if state.outcome else None
