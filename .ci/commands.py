"""Write docs/commands.md, every command of `trace-opd` with its arguments and options: `make docs`.

The text is the command line's own help. tests/test_docs.py compares the file with `page()`.
"""

import subprocess
import sys
from html import unescape
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
_APP = "trace_opd.pipelines.cli.commands"


def page() -> str:
    """The page as Markdown, from typer's description of the application."""
    command = [sys.executable, "-P", "-m", "typer", _APP, "utils", "docs"]
    options = ["--name", "trace-opd", "--title", "Commands"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return unescape(done.stdout)


if __name__ == "__main__":
    PAGE.write_text(page())
