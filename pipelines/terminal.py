"""The terminal that the command line writes to. Responses, problems, aliases, file names and what
servers say are untrusted: none of them may move the cursor, set a title, hide or turn what is shown.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import JSONHighlighter
from rich.segment import Segment
from rich.text import Text

from ..schemas.settings import dump_config
from .visible import INVISIBLE, visible


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
