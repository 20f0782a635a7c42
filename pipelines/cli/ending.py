"""How the command line ends: an exit code, and one sentence where something went wrong."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from ...schemas.errors import InputError, Stopped
from ...schemas.settings import shortened
from ..terminal import Terminal

logger = logging.getLogger(__name__)

_LONGEST_SENTENCE = 3000
_INTERRUPTED = 128 + signal.SIGINT
_NO_MEMORY = (
    "out of memory; give the process more, or smaller parts, batches and models, then run the same "
    "command again"
)
# torch raises a RuntimeError.
_TORCHS_NO_MEMORY = re.compile("(?i)out of memory|can't allocate memory|not enough memory")


def exit_code(run: Callable[[], object]) -> int:
    """Run the command line to its end; its exit code.

    0, or 2 for bad input, 143 after SIGTERM, 130 after Ctrl-C, 1 for a failure of the machine: memory,
    disk, output. Anything else is a fault of the program and keeps its traceback.
    """
    try:
        try:
            run()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except (InputError, Stopped) as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except MemoryError:
        logger.debug("out of memory", exc_info=True)
        _say(_NO_MEMORY)
        return 1
    except BrokenPipeError:  # nobody reads any more
        _drop_output()
        return 1
    except OSError as error:
        logger.debug("failed", exc_info=True)
        _drop_output()
        _say(_failed_machine(error))
        return 1
    except RuntimeError as error:
        if not _TORCHS_NO_MEMORY.search(str(error)):
            raise
        logger.debug("out of memory", exc_info=True)
        _say(f"{_NO_MEMORY} ({shortened(error)})")
        return 1
    return code


def end_threads_with_a_line() -> None:
    """Make a failure of the disk or of memory in a thread (TensorBoard writes in one) a logged line."""

    def log(failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, OSError):
            logger.warning("%s", _failed_machine(failed.exc_value))
        elif isinstance(failed.exc_value, MemoryError):
            logger.warning(_NO_MEMORY)
        else:
            threading.__excepthook__(failed)

    threading.excepthook = log


def _failed_machine(error: OSError) -> str:
    file = "" if error.filename is None else f"{shortened(_name(error.filename))}: "
    return f"{file}{error.strerror or error}; check the disk and the file, then run it again"


def _name(file: object) -> object:
    return os.fsdecode(file) if isinstance(file, bytes | os.PathLike) else file


def end_at_second_interrupt() -> None:
    """Make the second Ctrl-C end the process at once. The first is an ordinary KeyboardInterrupt.

    A thread reads the signals from a pipe, so the main thread may wait or compute meanwhile, and
    handlers that others install (asyncio's, a stage's) stay as they are.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_count_interrupts, args=(read,), daemon=True).start()


def _count_interrupts(read: int) -> None:
    count = 0
    while numbers := os.read(read, 64):
        count += numbers.count(signal.SIGINT)
        if count > 1:
            with suppress(OSError):
                os.write(2, b"\ntrace-opd: ended by the second Ctrl-C\n")
            os._exit(_INTERRUPTED)


def _say(sentence: str) -> None:
    # No stderr, or a full disk behind it: the exit code is all that is left.
    with suppress(OSError, ValueError):
        Terminal(stderr=True).print(
            f"trace-opd: {shortened(sentence, _LONGEST_SENTENCE)}", soft_wrap=True, highlight=False
        )


def _drop_output() -> None:
    """Let the interpreter's own flush at its end find an output that takes everything."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
