"""The stop of a run by Ctrl-C (SIGINT) or SIGTERM. The exit code is 128 + the signal's number.

The first signal lets a stage keep what it has begun: a training writes a checkpoint
(training/loop.py), a stage that asks servers waits for the answers in flight. A second Ctrl-C does
not wait. Elsewhere the first signal is a KeyboardInterrupt, which closes what is open.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ...schemas.errors import Interrupted, Stopped
from ..terminal import visible

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_of(number: int, sentence: str = "") -> Stopped | Interrupted:
    """The exception for a signal that ended a run. sentence: what was kept."""
    return Interrupted(sentence) if number == signal.SIGINT else Stopped(sentence)


def announce(sentence: str) -> None:
    """Print a line on standard error. A signal handler may call it."""
    # RuntimeError: the signal arrived within a write to the same stream.
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        print(f"\ntrace-opd: {visible(sentence)}", file=sys.stderr, flush=True)


@contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[dict[int, Any]]:
    """Call `handler` with the number of each SIGINT and SIGTERM during the block.

    Signals that the process ignores stay ignored (a shell starts background jobs without SIGINT).
    Outside the main thread signals are left alone. Yields the handlers from before, by number.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
        # None: a handler that C code installed, which cannot be restored.
        before = {n: was for n, was in before.items() if was not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, lambda number, _: handler(number))
    try:
        yield before
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@contextmanager
def children_without_interrupt() -> Iterator[None]:
    """Processes that this thread starts during the block never get the terminal's Ctrl-C.

    They inherit the blocked signal. Their parent gets it in another thread, and ends them in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def drained(drain: Callable[[], object], sentence: Callable[[], str]) -> Iterator[None]:
    """Call `drain` at the first SIGINT or SIGTERM; let the signal take effect after the block.

    drain: makes the block end soon. sentence: what was kept, asked for after the block. A second
    signal takes effect at once. Earlier handlers (a training's, Prefect's) get the signal after the
    block.

    Raises:
        Interrupted: after SIGINT; Stopped: after SIGTERM.
    """
    received: list[int] = []

    def first(number: int) -> None:
        for each, was in before.items():
            signal.signal(each, was)
        received.append(number)
        drain()

    with handled(first) as before:
        yield
    if not received:
        return
    if callable(handler := before[received[0]]):
        with suppress(KeyboardInterrupt):  # the one below has the sentence
            handler(received[0], None)
    raise stop_of(received[0], sentence())
