"""Graceful stop at Ctrl-C and SIGTERM: requests in flight are paid for, so they end first.

Engine `openai` wraps its requests in `drained`.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...schemas.errors import Stopped


@contextmanager
def drained(drain: Callable[[], object], sentence: str) -> Iterator[None]:
    """Call `drain` at the first SIGINT or SIGTERM; let the signal take effect after the block.

    drain: makes the block end soon. A second signal takes effect at once. Earlier handlers (a
    training's, Prefect's) get the signal after the block. Outside the main thread signals are left
    alone.

    Raises:
        KeyboardInterrupt: after SIGINT; Stopped, with the sentence: after SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    received: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:  # None: a handler that C code installed, which stays in place
                signal.signal(number, handler)

    def first(number: int, _: Any) -> None:
        restore()
        if before[signal.SIGINT] is signal.default_int_handler:
            # A KeyboardInterrupt within the event loop would leave tasks and print their
            # tracebacks.
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
