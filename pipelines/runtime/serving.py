"""A server in this process's event loop, which a signal stops in order. flows.py calls it."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from .signals import STOP_SIGNALS


async def serve_until_stopped(
    start: Callable[[], Coroutine[Any, Any, object]],
    started: Callable[[], bool],
    stop: Callable[[], Coroutine[Any, Any, object]],
    sentence: str,
) -> None:
    """Run a server until SIGTERM or Ctrl-C, which stop it; a second signal ends the process.

    started: whether the server has set signal handlers of its own, which these replace.
    sentence: printed at the first signal.
    """
    loop, stopping = asyncio.get_running_loop(), []

    def end() -> None:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
        print(sentence, file=sys.stderr)
        stopping.append(loop.create_task(stop()))

    serving = asyncio.ensure_future(start())
    while not started() and not serving.done():
        await asyncio.sleep(0.01)
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, end)
    await asyncio.gather(serving, *stopping)
