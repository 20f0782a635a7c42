"""A response cut into numbered segments: sentences and lines, never inside a formula.

Cuts come after a newline and after sentence punctuation followed by white space. No cut falls
inside `$…$`, `$$…$$`, `\\(…\\)`, `\\[…\\]`, an environment `\\begin{x}…\\end{x}`, a fenced code
block, or braces. Segments keep their white space, so their texts concatenated are the response.
"""

import re
from itertools import pairwise

from ..schemas.configs import SegmentConfig

# Spans in which no cut may fall. An opener that never closes protects nothing: a truncated or
# hostile response must not become one segment.
_PROTECTED = re.compile(
    r"""
      ```.*?```
    | \\begin\{(?P<env>[a-zA-Z*]+)\}.*?\\end\{(?P=env)\}
    | \$\$.+?\$\$
    | \\\[.+?\\\]
    | \\\(.+?\\\)
    | (?<![\\$])\$(?!\s|\$)(?:\\.|[^$\\\n])+?(?<!\s)\$(?!\d)
    """,
    re.DOTALL | re.VERBOSE,
)
_ABBREVIATIONS = (
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\bEq)(?<!\bFig)(?<!\bNo)(?<!\bapprox)"
)
# After a newline run; or after `.`, `!`, `?` (with closing quotes or brackets) and white space. A
# lone number before the point is a list marker ("1. First …"), which stays with its sentence.
_CUT = re.compile(
    rf"\n+[ \t]*|(?<!\n\d)(?<!\n\d\d)(?<!^\d)(?<!^\d\d){_ABBREVIATIONS}[.!?][\"')\]*]*[ \t]+(?=\S)|[。！？]"
)
_BRACES = re.compile(r"(?<!\\)[{}]")


def segment(text: str, config: SegmentConfig | None = None) -> list[tuple[int, int]]:
    """Cut `text` into (start, end) pairs of code points that tile it; [] for an empty text."""
    config = config or SegmentConfig()
    if not text:
        return []
    protected = _protected_ranges(text)
    cuts, at = [], 0
    for match in _CUT.finditer(text):
        end = match.end()
        while at < len(protected) and protected[at][1] <= match.start():
            at += 1
        inside = at < len(protected) and protected[at][0] < end and match.start() < protected[at][1]
        if not inside and 0 < end < len(text):
            cuts.append(end)
    bounds = [0, *cuts, len(text)]
    pieces = [(a, b) for a, b in pairwise(bounds) if a < b]
    pieces = _join_short(text, pieces, config.min_chars)
    return _merge_to(pieces, config.max_segments)


def _protected_ranges(text: str) -> list[tuple[int, int]]:
    """Sorted, disjoint ranges of formulas, code blocks and top-level brace groups."""
    ranges = [match.span() for match in _PROTECTED.finditer(text)]
    depth, start = 0, 0
    for match in _BRACES.finditer(text):
        if match.group() == "{":
            start = match.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                ranges.append((start, match.end()))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _join_short(text: str, pieces: list[tuple[int, int]], min_chars: int) -> list[tuple[int, int]]:
    """Join pieces of fewer than `min_chars` visible characters to the next, the last one back."""
    out: list[tuple[int, int]] = []
    start = pieces[0][0]
    for index, (_, end) in enumerate(pieces):
        if len(text[start:end].strip()) >= min_chars or index == len(pieces) - 1:
            out.append((start, end))
            start = end
    if len(out) > 1 and len(text[out[-1][0] : out[-1][1]].strip()) < min_chars:
        last = out.pop()
        out[-1] = (out[-1][0], last[1])
    return out


def _merge_to(pieces: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    if len(pieces) <= limit:
        return pieces
    edges = [round(i * len(pieces) / limit) for i in range(limit + 1)]
    return [(pieces[a][0], pieces[b - 1][1]) for a, b in pairwise(edges) if a < b]
