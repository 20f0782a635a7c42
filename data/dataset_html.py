"""A dataset as HTML, as `Dataset._repr_html_` gives it to a notebook.

A store may be someone else's: every text is escaped.
"""

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from .manifest import one_line

_MOST_FIGURES = 40
_LONGEST = 200  # characters of a figure
_LEVELS = 3  # of nested figures


def dataset_html(
    manifest: Mapping[str, Any],
    rows: int,
    made_from: Iterable[tuple[int, str, str, int]],
    where: str,
) -> str:
    """A heading, a table of the summary's figures, and the lineage.

    made_from: (depth, role, ref, rows) of everything that the dataset was made from, depth first;
    where: its files.
    """
    ref = f"{manifest['stage']}/{manifest['id']}"
    finished = manifest["finished_at"][:16].replace("T", " ")
    parts = len(manifest["parts"])
    counts = [f"{parts:,} part{'s' if parts != 1 else ''}", f"{rows:,} rows"]
    about = counts if parts else []
    if manifest["table"]:
        about.append(f"table {manifest['table']}")
    about += [f"finished {finished}", f"{manifest['seconds']:,.1f} s"]
    figures = list(_figures(manifest["summary"]))
    cells = [f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in figures]
    if (more := len(cells) - _MOST_FIGURES) > 0:
        cells[_MOST_FIGURES:] = [f"<tr><th></th><td>{more:,} more in .summary</td></tr>"]
    lineage = [
        f'<div style="margin-left: {depth}em">{_text(role)}: <code>{_text(name)}</code>, '
        f"{count:,} rows</div>"
        for depth, role, name, count in made_from
    ]
    return "".join(
        [
            f"<div><b><code>{_text(ref)}</code></b> {_text(', '.join(about))}</div>",
            f"<table>{''.join(cells)}</table>" if cells else "",
            f"<div>made from{''.join(lineage)}</div>" if lineage else "",
            f"<div><code>{_text(where)}</code></div>",
        ]
    )


def _figures(values: Mapping[str, Any], prefix: str = "", level: int = 1) -> Iterator[tuple]:
    """(name, text) of each figure; nested ones by dotted names."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value.keys() >= {"value", "ci95"}:
            yield name, _estimate(value)
        elif isinstance(value, dict) and value and level < _LEVELS:
            yield from _figures(value, f"{name}.", level + 1)
        elif key != "per_part":
            yield name, _figure(value)


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _estimate(found: Mapping[str, Any]) -> str:
    """An estimate with its 95 % interval."""
    if not isinstance(found["ci95"], list):
        return _figure(found["value"])
    return f"{_figure(found['value'])} ({' – '.join(map(_figure, found['ci95']))})"


def _text(value: Any) -> str:
    text = str(value)
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return escape(one_line(cut))
