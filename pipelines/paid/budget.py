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
        self.spent_usd = self.possibly_usd = 0.0

    def settle(self, spent_usd: float | None, possibly_usd: float = 0.0) -> None:
        """What the answer cost, and what may have been billed without one.

        spent_usd: None if unknown, which counts as the worst case; 0 for a request that was
        refused. A reservation that is never settled is given back, which is right for a request
        that was not sent.
        """
        self.spent_usd = self.usd if spent_usd is None else spent_usd
        self.possibly_usd = possibly_usd

    def unanswered(self) -> None:
        """The request was sent and has no answer: its worst case may have been billed."""
        self.settle(0.0, self.usd)


class Budget:
    """US dollars that may be spent, and what is gone of them: the cost of answers, what requests
    without an answer may have cost, and what requests in flight may take."""

    def __init__(self, limit_usd: float, spent_usd: float = 0.0, possibly_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self._spent_usd, self._possibly_usd = spent_usd, possibly_usd
        self._in_flight: set[Reservation] = set()
        self._lock = threading.RLock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def spent_usd(self) -> float:
        """What answers have cost."""
        return self._spent_usd

    @property
    def possibly_usd(self) -> float:
        """What requests without an answer may have cost."""
        return self._possibly_usd

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
            gone = self._spent_usd + self._possibly_usd
            if gone + worst_case_usd > self.limit_usd:
                possibly = f", ${self._possibly_usd:.4f} possibly billed without an answer"
                raise BudgetSpent(
                    f"the budget of ${self.limit_usd:g} has no room for a request of up to "
                    f"${worst_case_usd:.4g}: ${self._spent_usd:.4f} are spent"
                    f"{possibly if self._possibly_usd else ''}, ${self.reserved_usd:.4f} reserved "
                    "for requests in flight"
                )
            if gone + self.reserved_usd + worst_case_usd > self.limit_usd:
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
            self._spent_usd += reservation.spent_usd
            self._possibly_usd += reservation.possibly_usd
            waiting, self._waiting = self._waiting, []
        for loop, turn in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, turn)


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # its task may have been cancelled
        turn.set_result(None)
