"""Measured implementations, each in a process of its own, which answers one message at a time.

Several that are alive at once can take turns, so that drift of the machine affects them alike. On
CPU processes are forked from a server that has imported the code once.
"""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

ENDING_SECONDS = 10
NO_MEMORY = "needs more memory than is free"


class Ended(Exception):
    """A process ended instead of answering; its message is the reason."""


class Workers:
    """Processes by name; leaving the `with` block ends them."""

    def __init__(self, device: str, preload: list[str]) -> None:
        """preload: modules of packages that the processes need; the server of forks imports
        them.
        """
        # CUDA can't be used in a fork of a process that has asked for it.
        self._context: Any = multiprocessing.get_context(
            "spawn" if device == "cuda" else "forkserver"
        )
        if device != "cuda":
            self._context.set_forkserver_preload(preload)
        self._running: dict[str, tuple[Any, Connection]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.end(name)

    def start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        """Run work(*arguments, pipe) in a new process."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_run, args=(work, arguments, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the death of the process is noticed
        self._running[name] = process, ours

    def receive(self, name: str) -> Any:
        """Its next answer. Raises Ended if it fails or ends before."""
        process, pipe = self._running[name]
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            raise Ended(f"ended with exit code {process.exitcode}") from None
        if isinstance(answer, Ended):
            raise answer
        return answer

    def ask(self, name: str, message: Any) -> Any:
        """Its answer to a message. Raises Ended like `receive`."""
        # If it has ended, its reason may still be in the pipe.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._running[name][1].send(message)
        return self.receive(name)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that runs in a process of its own."""
        self.start(function.__name__, _answer, function, arguments)
        try:
            return self.receive(function.__name__)
        finally:
            self.end(function.__name__)

    def end(self, name: str) -> None:
        process, pipe = self._running.pop(name)
        pipe.close()  # it ends when it waits for the next message
        process.join(ENDING_SECONDS)
        process.terminate()
        process.join()


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    pipe.send(function(*arguments))


def _run(work: Callable[..., None], arguments: tuple[Any, ...], pipe: Connection) -> None:
    try:
        work(*arguments, pipe)
    except EOFError:  # the measuring process has closed the pipe
        return
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        memory = isinstance(error, MemoryError) or "out of memory" in str(error)
        memory = memory or "allocate memory" in str(error)
        if not memory:
            traceback.print_exc()
        pipe.send(Ended(NO_MEMORY if memory else f"{type(error).__name__}: {reason[0]}"))
        sys.exit(1)
