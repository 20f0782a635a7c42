"""How the command line ends: an exit code, and one sentence for an error. commands.py calls it."""

import _thread
import atexit
import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from ...schemas.errors import InputError, Stopped, shortened
from ...schemas.extras import missing_extra
from ..runtime.signals import STOP_SIGNALS
from ..terminal import Terminal, visible

logger = logging.getLogger(__name__)

# A path of the user's that can name no file: too long, through a file, or in a circle.
_BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_OUT_OF_MEMORY = (
    "out of memory; give the process more, or smaller parts, batches and models, then run the same "
    "command again"
)
# torch raises a RuntimeError with such a message.
_TORCH_OUT_OF_MEMORY = re.compile("(?i)out of memory|can't allocate memory|not enough memory")
_LOST_RANK = re.compile("Connection (closed|reset) by peer|Broken pipe|remote process exited")
_LATE_RANK = re.compile("Timed out waiting|collective operation timeout")


def exit_code(run: Callable[[], object]) -> int:
    """Run the command line and return its exit code.

    0, or 2 for bad input and a missing extra, 143 after SIGTERM, 130 after Ctrl-C, 1 if memory,
    disk or output failed. Of several ranks the first that ends prints.
    Any other exception is a fault of the program and keeps its traceback, unless a signal has
    arrived: libraries turn an interrupt into errors of their own.
    """
    try:
        return _exit_code(run)
    except (KeyboardInterrupt, Stopped) as error:
        return _stopped(error)
    except Exception as error:
        if _received:
            logger.debug("stopped", exc_info=True)
            return _stopped(None)
        if (sentence := _other_rank(error)) is not None:
            logger.debug("ended with another rank", exc_info=True)
            print_error(sentence)
            return 1
        _is_told()  # the traceback is this rank's to print
        raise


def _exit_code(run: Callable[[], object]) -> int:
    try:
        try:
            run()
            code = 0
        except SystemExit as ended:
            if _received:
                raise KeyboardInterrupt from None
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if sys.stdout is not None:  # None: the caller closed it
            sys.stdout.flush()
        return code
    except InputError as error:
        if _received:  # as when the interrupt ended a sampler's process too
            raise
        from .error_pages import with_page  # imports pyarrow

        print_error(with_page(error))
        return error.exit_code
    except ModuleNotFoundError as error:  # a command's own imports, which come late
        if (sentence := missing_extra(error)) is None:
            raise
        print_error(str(sentence))
        return sentence.exit_code
    except BrokenPipeError:  # the reader has closed the pipe
        _drop_output()
    except OSError as error:
        logger.debug("failed", exc_info=True)
        _drop_output()
        if error.errno in _BAD_PATH and error.filename is not None:
            print_error(f"{_name(error)}: {error.strerror}; name another path")
            return InputError.exit_code
        print_error(_machine_failure(error))
    except (MemoryError, RuntimeError) as error:
        detail = ""
        if isinstance(error, RuntimeError):
            if not _TORCH_OUT_OF_MEMORY.search(str(error)):
                raise
            detail = f" ({shortened(error)})"
        logger.debug("out of memory", exc_info=True)
        print_error(_OUT_OF_MEMORY + detail)
    return 1


def _several_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_told() -> bool:
    """Whether another rank has printed why all of them end. Otherwise this one has to."""
    if not _several_ranks():
        return False
    from ...trace.ranks import first_to_end  # imports torch

    return not first_to_end()


def _other_rank(error: Exception) -> str | None:
    """The sentence for a failed collective; None: the error is this rank's own."""
    if not (_several_ranks() and isinstance(error, RuntimeError)):
        return None
    if _LOST_RANK.search(str(error)):
        return (
            "another rank has ended; see its log and exit code, then give the same command again, "
            "which resumes from the newest checkpoint"
        )
    if _LATE_RANK.search(str(error)):
        return (
            f"another rank did not answer in time ({shortened(error)}); see its log, and raise "
            "wait_hours if it was at work"
        )
    return None


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


def stop_by_signals() -> None:
    """Ctrl-C and SIGTERM raise a KeyboardInterrupt; the second Ctrl-C ends the process at once.

    A stage that has something to keep replaces these handlers (runtime/signals.py). A thread reads
    signal numbers from a pipe: it works while the main thread blocks or computes.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _raise_again
    atexit.register(_ignore_signals)
    if not _pipe:  # once per process: a test calls the command line many times
        read, write = os.pipe()
        os.set_blocking(write, False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=_count_interrupts, args=(read,), daemon=True).start()
        _pipe.append(write)
    signal.set_wakeup_fd(_pipe[0], warn_on_full_buffer=False)


# Called before the second Ctrl-C ends the process: they end its children.
at_second_interrupt: list[Callable[[], object]] = []
_received: list[int] = []  # SIGINT and SIGTERM, in the order in which they arrived
_pipe: list[int] = []  # the end to which signal numbers are written
_LATER_S = 0.01
_lost: list[bool] = []  # interrupts that were raised where nothing can be raised


def _interrupt(number: int, _: object) -> None:
    # A scheduler may send SIGTERM twice.
    repeated = number == signal.SIGTERM and number in _received
    _received.append(number)
    if not repeated:
        raise KeyboardInterrupt


def _raise_again(unraisable: Any) -> None:
    """A KeyboardInterrupt in a destructor or a callback is raised again in the main thread."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _lost.append(True)
        # Later: raised at once, it would end here, where nothing can be raised either.
        again = threading.Timer(_LATER_S, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _count_interrupts(read: int) -> None:
    count = 0
    while numbers := os.read(read, 64):
        count += numbers.count(signal.SIGINT)
        # Torchrun passes the terminal's Ctrl-C on to its ranks, and kills them after 30 s.
        if count - len(_lost) > 1 and "RANK" not in os.environ:
            for end in [child.kill for child in active_children()] + at_second_interrupt:
                with suppress(Exception):
                    end()
            sentence = f"ended by the second Ctrl-C; {_to_continue()}"
            with suppress(OSError):
                os.write(2, f"\ntrace-opd: {visible(sentence)}\n".encode(errors="replace"))
            os._exit(128 + signal.SIGINT)


def _ignore_signals() -> None:
    """Ctrl-C while the interpreter ends would print a traceback."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stopped(error: BaseException | None) -> int:
    """Print one sentence on a run that a signal ended; its exit code."""
    number = _received[0] if _received else signal.SIGINT
    code = getattr(error, "exit_code", 128 + number)
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes prints
        kept = str(error or "") or "stopped; what is finished is kept"
        print_error(f"{kept}; {_to_continue()}")
    return code


def _to_continue() -> str:
    """The command line that continues this run."""
    if "RANK" in os.environ:
        return "to continue, give the same torchrun command again"
    program, *arguments = sys.argv
    if Path(program).name == "trace-opd":
        return f"to continue: {shlex.join(['trace-opd', *arguments])}"
    return f"to continue: {shlex.join(['python', *sys.orig_argv[1:]])}"


def print_error(sentence: str) -> None:
    if _is_told():
        return
    # Without stderr, or with a full disk behind it, only the exit code remains.
    with suppress(OSError, ValueError):
        Terminal(stderr=True).print(
            f"trace-opd: {' '.join(sentence.split())}", soft_wrap=True, highlight=False
        )


def _drop_output() -> None:
    """Point stdout to /dev/null, so that the interpreter's own flush at exit cannot fail."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
