"""Write the tables of docs/presets.md from the presets themselves: `make docs`.

tests/pipelines/cli/test_presets_page.py compares the file with `page()`.
"""

import re
from pathlib import Path

from trace_opd.pipelines.cli.presets import COLUMNS, columns
from trace_opd.schemas.presets import PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "presets.md"


def page(text: str) -> str:
    """The page with its tables as the presets are; `text` is its other text."""
    for name, table in {"settings": _settings(), "notes": _notes()}.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        new = f"{begin}\n{table}\n{end}"
        text = pattern.sub(lambda _, new=new: new, text)
    return text


def _settings() -> str:
    rows = [[f"`{name}`", *columns(preset).values()] for name, preset in PRESETS.items()]
    return _table(["preset", *COLUMNS], rows)


def _notes() -> str:
    rows = [[f"`{name}`", one.summary, one.certain, one.choice] for name, one in PRESETS.items()]
    return _table(["preset", "what it does", "certain", "our choice, and what differs"], rows)


def _table(heading: list[str], rows: list[list[str]]) -> str:
    cells = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in cells)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
