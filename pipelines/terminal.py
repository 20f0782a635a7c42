"""The terminal of the command line: every module that prints or logs uses it.

Responses, problems, aliases, file names and servers' messages are untrusted: none of them may move
the cursor, set a title, or hide or reverse what is shown.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import JSONHighlighter
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

from ..schemas.errors import InputError
from ..schemas.settings import dump_config

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

# Controls except newline and tab, characters that show nothing or change the reading direction
# (soft hyphen, fillers, zero-width and bidirectional marks, separators, interlinear marks, tags and
# supplementary variation selectors), and lone surrogates, which no encoding can write.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """The text with control, invisible and direction-changing characters written out.

    C0 controls become their control pictures (␛ for escape), others their code point (⟨U+202E⟩).
    """
    return INVISIBLE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def named(names: Sequence[str]) -> str:
    """A dataset's names, to follow its id."""
    return f" ({', '.join(names)})" if names else ""


class Terminal(Console):
    """A rich console that interprets no markup (`[red]`, `:tree:`) and writes invisible characters
    out. Only styles make colours."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """All output passes here: strings, tables, logs, progress bars."""
        for segment in super().render(renderable, options):
            if segment.control:  # rich's own cursor movements
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


console = Terminal()


@dataclass
class _Output:
    """quiet: --quiet; level: the root logger's before --quiet or --verbose changed it."""

    quiet: bool = False
    level: int | None = None


_output = _Output()


def choose_output(quiet: bool, verbose: bool) -> None:
    """quiet: errors and results alone. verbose: log lines from level DEBUG.

    Raises:
        InputError: both.
    """
    if verbose and (quiet or _output.quiet):
        raise InputError("--quiet and --verbose: contradict each other; give one of them")
    _output.quiet |= quiet
    if quiet or verbose:
        root = logging.getLogger()
        _output.level = root.level if _output.level is None else _output.level
        root.setLevel(logging.ERROR if quiet else logging.DEBUG)


def only_json() -> None:
    """From now on standard output has the JSON document alone: the rest goes to standard error."""
    console.stderr = True


def reset_output() -> None:
    """As before `choose_output` and `only_json`."""
    console.stderr = False
    if _output.level is not None:
        logging.getLogger().setLevel(_output.level)
    _output.quiet, _output.level = False, None


def is_quiet() -> bool:
    return _output.quiet


def say(line: object) -> None:
    """Print a line that is no result: nothing with --quiet."""
    if not _output.quiet:
        console.print(line, soft_wrap=True, highlight=False)


def warn(line: str) -> None:
    """Print a line on standard error that is no error: nothing with --quiet."""
    if not _output.quiet:
        Terminal(stderr=True).print(f"trace-opd: {line}", soft_wrap=True, highlight=False)


def print_data(data: Any) -> None:
    """Print the JSON document of a command with --json: the result, on standard output."""
    print_json(_plain(data), Terminal())


def _plain(data: Any) -> Any:
    """JSON's own types: NaN and infinities become null, enumerations and paths text."""
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, bool | int | str):
        return data
    return str(data)


def print_config(config: BaseModel) -> None:
    """Print a config as YAML, unchanged to a file or pipe, from which it may be read again."""
    text = dump_config(config)
    print(visible(text) if sys.stdout.isatty() else text, end="")


def print_json(data: Any, console: Console) -> None:
    """Print JSON with invisible characters in JSON's own escapes."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = INVISIBLE.sub(lambda match: json.dumps(match.group())[1:-1], text)
    # json.dumps does not escape DEL.
    console.print(JSONHighlighter()(Text(text.replace("\x7f", "\\u007f"))), soft_wrap=True)


def log_to_terminal() -> None:
    """Log to stderr from level $TRACE_OPD_LOG (default: WARNING).

    Raises:
        InputError: an unknown level.
    """
    level = os.environ.get("TRACE_OPD_LOG", "").strip().upper() or "WARNING"
    if level not in _LOG_LEVELS:
        raise InputError(
            f"environment variable TRACE_OPD_LOG is {level!r:.80}; set it to one of "
            f"{', '.join(_LOG_LEVELS)}"
        )
    handler = RichHandler(console=Terminal(stderr=True), show_path=False)
    # Below WARNING only our own logs: HTTP clients log headers, and a server may echo the key.
    handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name.startswith("trace_opd"))
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[handler])
    logging.raiseExceptions = False  # no traceback if the terminal is closed
    logging.captureWarnings(True)  # to the same terminal
