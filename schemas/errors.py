"""Exceptions that are not the program's fault: bad input, and a request to stop.

Every room raises them; the command line prints the sentence and exits with `exit_code`.
"""

from collections.abc import Sequence
from typing import Any

_SCREEN = 1600  # characters of 20 lines


class InputError(Exception):
    """Bad input from the user: one sentence with what, where, and how to mend it.

    The command line prints it without a traceback. A sentence longer than a screen loses its
    middle, because its end says how to mend the input.
    """

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(_within_a_screen(sentence))


class Stopped(Exception):
    """The run received SIGTERM and kept everything that it had finished.

    143 is a shell's exit code for SIGTERM. The command line adds the command that continues.
    """

    exit_code = 143


class Interrupted(KeyboardInterrupt):
    """As `Stopped`, after Ctrl-C (SIGINT). A bare `except Exception` does not catch it."""

    exit_code = 130


class TooManyFailed(InputError):
    """A stage's dataset is finished and kept, but too many of its rows failed to continue."""

    exit_code = 1


class Collapsed(InputError):
    """A training whose policy collapsed ended early, as its config asks; a checkpoint is kept."""

    exit_code = 3


class RowFault(InputError):
    """A row that its table's contract allows and other tables do not.

    table, rollout_id: where; a caller that knows the file names it.
    """

    def __init__(self, what: str, table: str = "", rollout_id: str = "") -> None:
        super().__init__(what if not rollout_id else f"rollout {rollout_id}: {what}")
        self.what, self.table, self.rollout_id = what, table, rollout_id


class OwnCodeError(InputError):
    """Code of the user's own raised an exception; the sentence names its line."""

    exit_code = 1


class EngineEnded(InputError):
    """A sampler's engine process ended during a call: killed, out of memory, or stopped with the
    run.
    """


class DamagedFile(InputError):
    """A file of the store does not hold what was written.

    On a network store this may be temporary, unlike all other bad input.
    """


def shortened(text: object, most: int = 300) -> str:
    """Text of unknown origin as one line of bounded length, to quote in a sentence."""
    words = " ".join(str(text).split())
    return words if len(words) <= most else words[:most] + "…"


def all_of(faults: Sequence[str]) -> str:
    """One fault, or a numbered list of them in one sentence."""
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults: " + "; ".join(f"({n}) {one}" for n, one in enumerate(faults, 1))


def quoted(value: Any, most: int = 80) -> str:
    """A value of unknown size, as Python writes it, as one line of bounded length."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # the repr of megabytes takes seconds
    elif isinstance(value, dict | list | tuple | set):
        return shortened(_container(value, most), most)
    return shortened(repr(value), most)


def _container(value: Any, most: int) -> str:
    """The start of a container's repr: elements until `most` characters are full."""
    opening, closing = {dict: "{}", list: "[]"}.get(type(value), "()")
    parts, length = [], 0
    for key in value:
        part = quoted(key, most)
        if isinstance(value, dict):
            part += f": {quoted(value[key], most)}"
        parts.append(part)
        length += len(part)
        if length > most:
            break
    return f"{opening}{', '.join(parts)}{closing}"


def _within_a_screen(sentence: str) -> str:
    if len(sentence) <= _SCREEN:
        return sentence
    return f"{sentence[: _SCREEN // 2]} … {sentence[-_SCREEN // 2 :]}"
