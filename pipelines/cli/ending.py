"""How the command line ends: an exit code, and one sentence for an error. commands.py calls it."""

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from ...schemas.errors import InputError, Stopped, shortened
from ...schemas.extras import missing_extra
from ..terminal import Terminal

logger = logging.getLogger(__name__)

# A path of the user's that can name no file: too long, through a file, or in a circle.
_BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_INTERRUPTED = 128 + signal.SIGINT
_OUT_OF_MEMORY = (
    "out of memory; give the process more, or smaller parts, batches and models, then run the same "
    "command again"
)
# torch raises a RuntimeError with such a message.
_TORCH_OUT_OF_MEMORY = re.compile("(?i)out of memory|can't allocate memory|not enough memory")


def exit_code(run: Callable[[], object]) -> int:
    """Run the command line and return its exit code.

    0, or 2 for bad input and a missing extra, 143 after SIGTERM, 130 after Ctrl-C, 1 if memory,
    disk or output failed.
    Any other exception is a fault of the program and keeps its traceback.
    """
    try:
        try:
            run()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if sys.stdout is not None:  # None: the caller closed it
            sys.stdout.flush()
        return code
    except (InputError, Stopped) as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ModuleNotFoundError as error:  # a command's own imports, which come late
        if (sentence := missing_extra(error)) is None:
            raise
        _print_error(str(sentence))
        return sentence.exit_code
    except BrokenPipeError:  # the reader has closed the pipe
        _drop_output()
    except OSError as error:
        logger.debug("failed", exc_info=True)
        _drop_output()
        if error.errno in _BAD_PATH and error.filename is not None:
            _print_error(f"{_name(error)}: {error.strerror}; name another path")
            return InputError.exit_code
        _print_error(_machine_failure(error))
    except (MemoryError, RuntimeError) as error:
        detail = ""
        if isinstance(error, RuntimeError):
            if not _TORCH_OUT_OF_MEMORY.search(str(error)):
                raise
            detail = f" ({shortened(error)})"
        logger.debug("out of memory", exc_info=True)
        _print_error(_OUT_OF_MEMORY + detail)
    return 1


def log_thread_failures() -> None:
    """Log a disk or memory failure in a thread (TensorBoard writes in one) as one line."""

    def log(failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, OSError):
            logger.warning("%s", _machine_failure(failed.exc_value))
        elif isinstance(failed.exc_value, MemoryError):
            logger.warning(_OUT_OF_MEMORY)
        else:
            threading.__excepthook__(failed)

    threading.excepthook = log


def _name(error: OSError) -> str:
    name = error.filename
    return shortened(os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else name)


def _machine_failure(error: OSError) -> str:
    file = "" if error.filename is None else f"{_name(error)}: "
    return f"{file}{error.strerror or error}; check the disk and the file, then run it again"


def end_at_second_interrupt() -> None:
    """Make the second Ctrl-C end the process at once; the first is an ordinary KeyboardInterrupt.

    A thread reads signal numbers from a pipe: it works while the main thread blocks or computes,
    and replaces no signal handler (asyncio's, a stage's).
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


def _print_error(sentence: str) -> None:
    # Without stderr, or with a full disk behind it, only the exit code remains.
    with suppress(OSError, ValueError):
        Terminal(stderr=True).print(
            f"trace-opd: {' '.join(sentence.split())}", soft_wrap=True, highlight=False
        )


def _drop_output() -> None:
    """Point stdout to /dev/null, so that the interpreter's own flush at exit cannot fail."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
