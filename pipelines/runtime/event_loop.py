"""An event loop in a thread of its own, for engines that send many requests at once.

The caller may have a running loop itself, as a notebook's cell has, where `asyncio.run` is refused.
A signal reaches the waiting caller and never interrupts the loop.
"""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

_T = TypeVar("_T")


class EventLoop:
    """Runs coroutines until `close`; clients and locks of one call may be used in the next."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="event loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result. An exception in this thread (a KeyboardInterrupt) cancels it."""
        result: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        def done(task: asyncio.Task[_T]) -> None:
            if task.cancelled():
                result.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(done)

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # the interrupt was before `begin`
                coroutine.close()
                result.set_exception(asyncio.CancelledError())

        try:
            self._loop.call_soon_threadsafe(begin)
            return result.result()
        except BaseException:
            if not result.done():
                self._loop.call_soon_threadsafe(cancel)
                wait([result])
            raise

    def soon(self, call: Any) -> None:
        """Call a function in the loop. A signal handler may use it."""
        self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        if self._loop.is_closed():
            return
        self.run(_cancel_others())
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
