"""Load balancing for engine openai: which of several servers gets the next request."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import openai


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
