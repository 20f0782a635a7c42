"""Ctrl-C and SIGTERM while requests are in flight: they are paid for, so they end first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...schemas.errors import Stopped


@contextmanager
def drained(drain: Callable[[], object], sentence: str) -> Iterator[None]:
    """At the first SIGINT or SIGTERM call `drain`, which makes the work within end soon; only then
    does the signal take its effect. A second signal takes it at once.

    Handlers that were there (a training's, Prefect's) get the signal after the work. Outside the main
    thread signals stay theirs.

    Raises:
        KeyboardInterrupt: after SIGINT; Stopped, with the sentence: after SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    received: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:  # a handler that is not Python's stays in place
                signal.signal(number, handler)

    def first(number: int, _: Any) -> None:
        restore()
        if before[signal.SIGINT] is signal.default_int_handler:
            # A KeyboardInterrupt within the event loop would leave tasks and print their tracebacks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        received.append(number)
        drain()

    for number, handler in before.items():
        if handler not in (None, signal.SIG_IGN):
            signal.signal(number, first)
    try:
        yield
    finally:
        restore()
    if not received:
        return
    if callable(handler := before[received[0]]):
        handler(received[0], None)
    if received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(sentence)
