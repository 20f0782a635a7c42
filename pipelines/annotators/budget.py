"""A spending limit that holds under concurrency: the worst case is reserved before a request is sent.

Reserved and spent money together never exceed the limit, so neither can the bill, whatever the
answers turn out to cost. Tasks of several event loops on several threads may share one budget.
An engine reserves through `spending.Spending`, which knows the price. That a limit holds over runs
is the journal's work: it keeps each reservation on the disk until the bill is known.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BudgetSpent(Exception):
    """A request does not fit into what is left; its text says limit, spent and reserved."""


class Reservation:
    """Money set aside for one request. usd: its worst case."""

    def __init__(self, usd: float) -> None:
        self.usd = usd
        self.actual_usd = 0.0

    def settle(self, actual_usd: float | None) -> None:
        """What the request cost; None if that is unknown, which counts as the worst case.

        A reservation that is left unsettled is given back: right for a request that was not sent,
        wrong for one whose answer may have been made and billed before the connection broke. Settle
        that one with None.
        """
        self.actual_usd = self.usd if actual_usd is None else actual_usd


class Budget:
    """US dollars that may be spent, what has been spent, and what requests in flight may take."""

    def __init__(self, limit_usd: float, spent_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self._spent_usd = spent_usd
        self._in_flight: set[Reservation] = set()
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def spent_usd(self) -> float:
        return self._spent_usd

    @property
    def reserved_usd(self) -> float:
        with self._lock:
            return self._reserved()

    @asynccontextmanager
    async def reserve(self, worst_case_usd: float) -> AsyncIterator[Reservation]:
        """Set the worst case aside for the time of one request; settle it before leaving.

        Where there is no room, wait for requests in flight: most cost less than was reserved.

        Raises:
            BudgetSpent: there would be no room even if all requests in flight cost nothing.
        """
        while True:
            with self._lock:  # no release may come between looking for room and queueing
                reservation = self._take(worst_case_usd)
                turn = None if reservation is not None else self._queue()
            if turn is None:
                break
            await turn
        assert reservation is not None, "there is a turn to wait for otherwise"
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
            return self._take(worst_case_usd)

    def hold(self, worst_case_usd: float) -> Reservation:
        """Set aside what was sent before this budget was opened, room or not."""
        reservation = Reservation(worst_case_usd)
        with self._lock:
            self._in_flight.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Replace what was set aside by what was settled."""
        with self._lock:
            self._in_flight.remove(reservation)
            self._spent_usd += reservation.actual_usd
            waiting, self._waiting = self._waiting, []
        for loop, turn in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, turn)

    def _queue(self) -> asyncio.Future[None]:
        """Done when something has been settled."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((loop, turn))
        return turn

    def _take(self, worst_case_usd: float) -> Reservation | None:
        if self._spent_usd + worst_case_usd > self.limit_usd:
            raise BudgetSpent(
                f"the budget of ${self.limit_usd:g} has no room for a request of up to "
                f"${worst_case_usd:.4g}: ${self._spent_usd:.4f} are spent or may have been billed, "
                f"${self._reserved():.4f} reserved for requests in flight"
            )
        reservation = Reservation(worst_case_usd)
        if self._spent_usd + self._reserved() + worst_case_usd > self.limit_usd:
            return None
        self._in_flight.add(reservation)
        return reservation

    def _reserved(self) -> float:
        # Summed anew: a running difference of floats would drift away from zero.
        return sum(reservation.usd for reservation in self._in_flight)


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # its task may have been cancelled
        turn.set_result(None)
