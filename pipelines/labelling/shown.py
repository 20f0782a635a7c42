"""A response as Label Studio shows it: HTML in which each character counts as one code point.

Label Studio counts an HTML's characters in code points, text node by text node, but cuts text nodes
in UTF-16 units: behind a character outside the basic plane (emoji, mathematical letters) its marks
slip. So each such character is in a text node of its own. HTML readers turn carriage returns into
line feeds and drop control characters, so a picture stands for each (U+2400 …), one for one.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SEGMENT_CLASS = "trace-opd-segment"

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES[0x7F] = "\u2421"
_TAG = re.compile("<[^>]*>")  # the text's own signs are escaped
_ASTRAL = re.compile("([\U00010000-\U0010ffff])")


@dataclass(frozen=True)
class TextNode:
    """A text node of the HTML. start, end: its characters in the response; path: its XPath below
    the element that holds the HTML."""

    start: int
    end: int
    path: str


def shown(text: str) -> str:
    """A text with a visible sign for each control character but tab and line feed; same length."""
    return text.translate(_PICTURES)


def response_html(response: str, segments: Sequence[tuple[int, int]]) -> tuple[str, list[TextNode]]:
    """The HTML of a response, an element per segment, and its text nodes in order."""
    parts, nodes = [], []
    for number, (start, end) in enumerate(segments, 1):
        path = f"/span[{number}]"
        parts.append(f'<span class="{SEGMENT_CLASS}">')
        for piece, below in _pieces(shown(response[start:end])):
            escaped = html.escape(piece)
            parts.append(f"<span>{escaped}</span>" if below.startswith("/span") else escaped)
            nodes.append(TextNode(start, start + len(piece), path + below))
            start += len(piece)
        parts.append("</span>")
    return "".join(parts), nodes


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """The text nodes of a segment, each with its path below the segment's element."""
    plain = wide = 0
    for piece in _ASTRAL.split(text):
        if not piece:
            continue
        if _ASTRAL.fullmatch(piece):
            wide += 1
            yield piece, f"/span[{wide}]/text()[1]"
        else:
            plain += 1
            yield piece, f"/text()[{plain}]"


def html_text(content: str) -> str:
    """The text of `response_html`'s HTML."""
    return html.unescape(_TAG.sub("", content))
