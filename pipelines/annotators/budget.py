"""A spending limit that holds under concurrency: the worst case is reserved before a request is
sent.

Reserved and spent money together never exceed the limit, so neither can the bill. Tasks of several
event loops on several threads may share one budget. Called by spending.py, which knows the price;
over several runs the journal keeps each reservation on disk until the bill is known.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BudgetSpent(Exception):
    """A request does not fit into what is left; the text names limit, spent and reserved."""


class Reservation:
    """Money set aside for one request. usd: its worst case."""

    def __init__(self, usd: float) -> None:
        self.usd = usd
        self.actual_usd = 0.0

    def settle(self, actual_usd: float | None) -> None:
        """What the request cost. None: unknown, counted as the worst case.

        A reservation that is never settled is given back, which is right for a request that was not
        sent. Settle with None a request that may have been billed before its connection broke.
        """
        self.actual_usd = self.usd if actual_usd is None else actual_usd


class Budget:
    """US dollars that may be spent, what has been spent, and what requests in flight may take."""

    def __init__(self, limit_usd: float, spent_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self._spent_usd = spent_usd
        self._in_flight: set[Reservation] = set()
        self._lock = threading.RLock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def spent_usd(self) -> float:
        return self._spent_usd

    @property
    def reserved_usd(self) -> float:
        with self._lock:
            # Summed anew: a running difference of floats would drift away from zero.
            return sum(reservation.usd for reservation in self._in_flight)

    @asynccontextmanager
    async def reserve(self, worst_case_usd: float) -> AsyncIterator[Reservation]:
        """Set the worst case aside for the time of one request; settle it before leaving.

        Without room this waits for requests in flight: most cost less than was reserved.

        Raises:
            BudgetSpent: there would be no room even if all requests in flight cost nothing.
        """
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:  # no release between the search for room and the wait
                reservation = self.take(worst_case_usd)
                if reservation is not None:
                    break
                turn: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, turn))
            await turn
        try:
            yield reservation
        finally:
            self.release(reservation)

    def take(self, worst_case_usd: float) -> Reservation | None:
        """Set the worst case aside until `release`; None if there is no room for it now.

        Raises:
            BudgetSpent: as `reserve`.
        """
        with self._lock:
            if self._spent_usd + worst_case_usd > self.limit_usd:
                raise BudgetSpent(
                    f"the budget of ${self.limit_usd:g} has no room for a request of up to "
                    f"${worst_case_usd:.4g}: ${self._spent_usd:.4f} are spent or may have been "
                    f"billed, ${self.reserved_usd:.4f} reserved for requests in flight"
                )
            if self._spent_usd + self.reserved_usd + worst_case_usd > self.limit_usd:
                return None
            return self.hold(worst_case_usd)

    def hold(self, worst_case_usd: float) -> Reservation:
        """Set aside what was sent before this budget was opened, with or without room."""
        reservation = Reservation(worst_case_usd)
        with self._lock:
            self._in_flight.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Replace a reservation by what was settled, and wake all that wait for room."""
        with self._lock:
            self._in_flight.remove(reservation)
            self._spent_usd += reservation.actual_usd
            waiting, self._waiting = self._waiting, []
        for loop, turn in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, turn)


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # its task may have been cancelled
        turn.set_result(None)
