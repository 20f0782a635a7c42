"""The terminal that the command line writes to. Responses, problems, aliases, file names and what
servers say are untrusted: none of them may move the cursor, set a title, hide or turn what is shown.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import JSONHighlighter
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

from ..schemas.errors import InputError
from ..schemas.settings import dump_config
from .visible import INVISIBLE, visible

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Terminal(Console):
    """A rich console that prints every text as it is: `[red]` and `:tree:` are no markup, and what
    is not visible is written out. Colours come from styles alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Everything that is printed passes here: strings, tables, logs, progress bars."""
        for segment in super().render(renderable, options):
            if segment.control:  # rich's own cursor movements
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


console = Terminal()


def print_config(config: BaseModel) -> None:
    """Print a config as YAML; to a file or a pipe it goes unchanged, since it is read from there."""
    text = dump_config(config)
    print(visible(text) if sys.stdout.isatty() else text, end="")


def print_json(data: Any, console: Console) -> None:
    """Print JSON whose strings hold what is not visible in JSON's own escapes."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = INVISIBLE.sub(lambda match: json.dumps(match.group())[1:-1], text)
    # json.dumps leaves DEL as it is.
    console.print(JSONHighlighter()(Text(text.replace("\x7f", "\\u007f"))), soft_wrap=True)


def log_to_terminal() -> None:
    """Log to stderr from the level of $TRACE_OPD_LOG on.

    Raises:
        InputError: there is no such level.
    """
    level = os.environ.get("TRACE_OPD_LOG", "").strip().upper() or "WARNING"
    if level not in _LOG_LEVELS:
        raise InputError(
            f"environment variable TRACE_OPD_LOG is {level!r:.80}; set it to one of "
            f"{', '.join(_LOG_LEVELS)}"
        )
    handler = RichHandler(console=Terminal(stderr=True), show_path=False)
    # Details are ours alone: HTTP clients log every header, and a server may echo the key in one.
    handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name.startswith("trace_opd"))
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[handler])
    logging.raiseExceptions = False  # a terminal that is gone is no reason for a traceback
    logging.captureWarnings(True)  # through the same terminal
