"""Cutting a response into numbered segments: sentences and lines, never inside a formula.

Annotators number these segments in their prompt. Cuts follow a newline, or sentence punctuation and
white space. No cut falls inside `$…$`, `$$…$$`, `\\(…\\)`, `\\[…\\]`, an environment
`\\begin{x}…\\end{x}`, a fenced code block, or braces. Segments keep their white space, so their
concatenated texts are the response.
"""

import re
from itertools import pairwise

from ..schemas.configs import SegmentConfig

# Openers of a range without cuts. An opener without a closer protects nothing: a truncated or
# hostile response must not become one segment.
_OPENER = re.compile(
    r"""
      ```
    | \\begin\{(?P<env>[a-zA-Z*]+)\}
    | \$\$
    | \\\[
    | \\\(
    | (?<![\\$])\$(?![\s$])
    """,
    re.VERBOSE,
)
_CLOSER = {"```": "```", "$$": "$$", "\\[": "\\]", "\\(": "\\)"}
_END = re.compile(r"\\end\{[a-zA-Z*]+\}")
_INLINE = re.compile(r"\$(?:\\.|[^$\\\n])+?(?<!\s)\$(?!\d)", re.DOTALL)
# Texts before `.`, `!` or `?` that do not end a sentence: numbers of a list ("1. First …"), which
# stay with their items, and abbreviations. Lookbehinds, so that the search skips from sign to sign.
_NO_END = "".join(
    rf"(?<!{before}[.!?])"
    for before in (
        r"\n\d", r"\n\d\d", r"^\d", r"^\d\d", r"\be\.g", r"\bi\.e", r"\bcf", r"\bvs", r"\bEq",
        r"\bFig", r"\bNo", r"\bapprox",
    )
)  # fmt: skip
# After a newline run; or after `.`, `!`, `?` (with closing quotes or brackets) and white space.
_CUT = re.compile(rf"\n+[ \t]*|[.!?]{_NO_END}[\"')\]*]*[ \t]+(?=\S)|[。！？]")
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
    merged: list[tuple[int, int]] = []
    for start, end in sorted(_delimited(text) + _brace_groups(text)):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _delimited(text: str) -> list[tuple[int, int]]:
    """Ranges of formulas, environments and code blocks, each from its opener to its closer.

    The last position of each closer is known, so no search runs to the end in vain: the time is
    linear in the text for any number of unclosed openers.
    """
    last = {closer: text.rfind(closer) for closer in _CLOSER.values()}
    last |= {match.group(): match.start() for match in _END.finditer(text)}
    ranges, at = [], 0
    while opener := _OPENER.search(text, at):
        start = opener.start()
        if opener.group() == "$":
            inline = _INLINE.match(text, start)
            end = inline.end() if inline else -1
        else:
            closer = _CLOSER.get(opener.group()) or f"\\end{{{opener['env']}}}"
            found = opener.end() <= last.get(closer, -1)
            end = text.find(closer, opener.end()) + len(closer) if found else -1
        if end > 0:
            ranges.append((start, end))
        at = max(end, start + 1)
    return ranges


def _brace_groups(text: str) -> list[tuple[int, int]]:
    """Ranges from each opening brace to its closing brace; unmatched braces are text."""
    ranges, open_at = [], []
    for match in _BRACES.finditer(text):
        if match.group() == "{":
            open_at.append(match.start())
        elif open_at:
            ranges.append((open_at.pop(), match.end()))
    return ranges


def _join_short(text: str, pieces: list[tuple[int, int]], min_chars: int) -> list[tuple[int, int]]:
    """Join pieces of fewer than `min_chars` visible characters to the next piece, the last to the
    one before."""
    out: list[tuple[int, int]] = []
    start = pieces[0][0]
    visible = [-1, -1]  # first visible character since start, one past the last
    for index, (begin, end) in enumerate(pieces):
        if stripped := text[begin:end].strip():
            first = text.index(stripped[0], begin)
            visible = [first if visible[0] < 0 else visible[0], first + len(stripped)]
        if visible[1] - visible[0] >= min_chars or index == len(pieces) - 1:
            out.append((start, end))
            start, visible = end, [-1, -1]
    if len(out) > 1 and len(text[out[-1][0] : out[-1][1]].strip()) < min_chars:
        last = out.pop()
        out[-1] = (out[-1][0], last[1])
    return out


def _merge_to(pieces: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    if len(pieces) <= limit:
        return pieces
    edges = [round(i * len(pieces) / limit) for i in range(limit + 1)]
    return [(pieces[a][0], pieces[b - 1][1]) for a, b in pairwise(edges) if a < b]
