"""Cutting a response into numbered segments: sentences and lines, never inside a formula.

Annotators number these segments in their prompt. Cuts follow a newline, or sentence punctuation and
white space. No cut falls inside `$…$`, `$$…$$`, `\\(…\\)`, `\\[…\\]`, an environment
`\\begin{x}…\\end{x}`, a fenced code block, or braces; nor behind an abbreviation, a factorial, or
the label of a step ("1.", "**Step 1.**"). Segments keep their white space, so their concatenated
texts are the response.
"""

import re
from itertools import pairwise

from ..schemas.configs import SegmentConfig

# Openers of a range without cuts, and formulas in one line. An opener without a closer protects
# nothing: a truncated or hostile response must not become one segment.
_OPENER = re.compile(
    r"""
    [`~\\$]
    (?: (?<=`)`{2,}
      | (?<=~)~{2,}
      | (?<=\\)(?:[\[(]|begin\{[a-zA-Z*]+\})
      | (?<=\$)(?<!\\\$)(?:\$|(?P<inline>(?!\s)(?:[^$\\\n]++|\\.)++(?<!\s)\$(?!\d)))?
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_CLOSER = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
_FENCE = re.compile(r"`{3,}|~{3,}")
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([a-zA-Z*]+)\}")
_TO_DOLLAR = re.compile(r"(?:[^$\\]|\\.)*+", re.DOTALL)
_BRACES = re.compile(r"[{}](?<!\\.)")

# What a `$…$` with spaces at its edges or with a newline is not: a paragraph, an amount of money
# before a word, or prose between two signs of money.
_NO_FORMULA = re.compile(
    r"\n\s*\n | ^\d[\d,.]*[;:!?)]*\s+[A-Za-z]{2} | \b[A-Za-z]{2,}[.,;:!?]?\s+[A-Za-z]{2}",
    re.VERBOSE,
)
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})?")

# After a newline run; after `.`, `!`, `?` (with closing quotes, brackets or stars) and white space;
# after a formula that ends with a full stop. The signs come first: the search skips to them.
_CUT = re.compile(
    r"""
    [\n.!?。！？$\\]
    (?: (?<=\n)\n*[ \t]*
      | (?<=[.!?])["'”’»)\]*_]*[ \t]+(?=\S)
      | (?<=[。！？])[。！？"'”’」』）)\]*]*
      | (?:(?<=\$)|(?<=\\)[\])])[ \t]+(?=[A-Z])
    )
    """,
    re.VERBOSE,
)
# Words before a full stop that does not end the sentence …
_ABBREVIATION = re.compile(
    r"approx|cf|cors?|defs?|dr|e\.g|eqn?s?|figs?|i\.e|lem|mrs?|ms|prof|props?|thms?|viz|vs", re.I
)
# … and those that end it before a capitalised word only ("see Sec. 2", "in 5 sec. Then").
_SOMETIMES = re.compile(
    r"a\.m|al|alg|app|apr|art|aug|avg|chap|ch|co|dec|dept|ed|etc|exs?|feb|ft|gal|hrs?|inc|incl|in"
    r"|jan|jr|lbs?|ltd|max|mi|min|nos?|nov|obs|oct|oz|pp?|p\.m|prob|refs?|rem|resp|sec|sect|sept?"
    r"|sol|sq|sr|st|tab|vol|yd|yrs?|[a-z](?:\.[a-z])+",
    re.I,
)
_WORD = re.compile(r"(?<![\w.])[A-Za-z](?:\.?[A-Za-z])*\Z")
# Initials behind another or a title, and before another and a name; a lone one is a variable.
_INITIAL = re.compile(r"(?:(?<![\w.])[A-Z]\.[ ]?|\b(?:Dr|Mrs?|Ms|Prof)\.[ ])[A-Z]\Z")
_NAME = re.compile(r"[A-Z][a-z]")
_INITIAL_AND_NAME = re.compile(r"[A-Z]\.[ ]?[A-Z][a-z.]")
_FACTORIAL = re.compile(r"(?:\d|\)|(?<![^\W_])[A-Za-z])\Z")
# The label of an item or a step, alone in its segment: it stays with the text behind it.
_LABEL = re.compile(
    r"""
    [\s>#*_•+-]*
    (?: \(?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[ivx]{1,5}|[IVX]{1,5})\)?
      | (?:Answer|Approach|Case|Claim|Corollary|Definition|Example|Exercise|Fact|Lemma|Method|Note
          |Observation|Option|Part|Phase|Problem|Proof|Proposition|Question|Remark|Section|Solution
          |Stage|Step|Subcase|Theorem)
        (?:[ ](?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[IVX]{1,5}))?
        (?:[ ]\([^()\n]{1,40}\))?
    )
    """,
    re.VERBOSE,
)
_BOLD = re.compile(r"[\s>#•+-]*(?:\*{1,3}[^*\n]{1,60}|__[^_\n]{1,60})")
_LONGEST_LABEL = 72


def segment(text: str, config: SegmentConfig | None = None) -> list[tuple[int, int]]:
    """Cut `text` into (start, end) pairs of code points that tile it; [] for an empty text."""
    config = config or SegmentConfig()
    if not text:
        return []
    protected = _protected_ranges(text)
    bounds, at = [0], 0
    for match in _CUT.finditer(text):
        begin, end = match.span()
        while at < len(protected) and protected[at][1] <= begin:
            at += 1
        inside = at < len(protected) and protected[at][0] < end
        if text[begin] in "$\\":  # the closer of a formula with a full stop
            stop = text[max(0, begin - 3) : begin].rstrip(" $").endswith(".")
            ends = stop and inside and protected[at][1] <= end
        else:
            ends = not inside and _ends_sentence(text, bounds[-1], begin, end)
        if ends and end < len(text):
            bounds.append(end)
    pieces = list(pairwise([*bounds, len(text)]))
    pieces = _join_short(text, pieces, config.min_chars)
    return _merge_to(pieces, config.max_segments)


def _ends_sentence(text: str, start: int, sign: int, end: int) -> bool:
    """Whether the sign at `sign` ends the sentence or line that begins at `start`.

    end: where the text goes on, behind quotes and white space.
    """
    if text[sign] not in ".!?" or end == len(text):
        return True
    following, recent = text[end], text[max(start, sign - 16) : sign]
    if sign - start <= _LONGEST_LABEL and text[sign] != "!":
        head, closed = text[start:sign], text[sign + 1 : end].rstrip()
        if text[sign] == "." and _LABEL.fullmatch(head):
            return following.islower() and head.strip().isalpha() and len(head.strip()) == 1
        if closed[-1:] in ("*", "_") and _BOLD.fullmatch(head):
            return False
    if text[sign] == "!":
        goes_on = following.islower() or following in "=+-/×·≤≥≠^,;:"
        return not (goes_on and _FACTORIAL.search(recent))
    if text[sign] == "?":
        return following not in "=+,;"
    if recent.endswith(".."):
        return following.isupper()
    word = _WORD.search(recent)
    if word is None:
        return True
    if _ABBREVIATION.fullmatch(word[0]):
        return False
    if _SOMETIMES.fullmatch(word[0]):
        return following.isupper()
    if len(word[0]) > 1 or word[0].islower():
        return True
    named = _NAME.match(text, end) and _INITIAL.search(recent)
    return not (named or _INITIAL_AND_NAME.match(text, end))


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
    named = _fences(text) | _environments(text)
    last = {closer: text.rfind(closer) for closer in _CLOSER.values()}
    ranges, at = [], 0
    while opener := _OPENER.search(text, at):
        start, end, sign = opener.start(), -1, opener.group()
        if opener["inline"]:
            end = opener.end()
        elif sign == "$":
            end = _spaced_end(text, start)
        elif closer := _CLOSER.get(sign):
            if opener.end() <= last[closer]:
                end = text.find(closer, opener.end()) + len(closer)
        elif sign[0] != "~" or _begins_line(text, start):
            end = named.get(start, -1)
        if end > 0:
            ranges.append((start, end))
        at = max(end, opener.end())
    return ranges


def _begins_line(text: str, at: int) -> bool:
    return text[max(0, at - 8) : at].rstrip(" \t")[-1:] in ("", "\n")


def _fences(text: str) -> dict[int, int]:
    """The end of each code block by its start: that of the next run of its sign as long."""
    ends: dict[int, int] = {}
    begun: dict[str, list[tuple[int, int]]] = {"`": [], "~": []}
    for match in _FENCE.finditer(text):
        start, end = match.span()
        waiting = begun[text[start]]
        while waiting and waiting[-1][1] <= end - start:
            ends[waiting.pop()[0]] = end
        waiting.append((start, end - start))
    return ends


def _environments(text: str) -> dict[int, int]:
    """The end of each environment by its start; one may contain others of its own name."""
    ends: dict[int, int] = {}
    begun: dict[str, list[int]] = {}
    for match in _ENVIRONMENT.finditer(text):
        kind, name = match.groups()
        if kind == "begin":
            begun.setdefault(name, []).append(match.start())
        elif begun.get(name):
            ends[begun[name].pop()] = match.end()
    return ends


def _spaced_end(text: str, start: int) -> int:
    """One past the closer of a `$…$` with white space inside its signs or with a newline.

    −1 where it is no formula but prose with amounts of money: "$5 and $6".
    """
    found = _TO_DOLLAR.match(text, start + 1)
    close = found.end() if found else start + 1
    content, behind = text[start + 1 : close], text[close + 1 : close + 3]
    inner, before = content.strip(), text[max(0, start - 2) : start]
    if not inner or not text.startswith("$", close) or (inner == content and "\n" not in content):
        return -1
    amount = content[0] in " .,;:!?" and before.strip()[-1:].isdigit()  # "5 $ and 6 $"
    amount |= behind[:1] == " " and behind[1:].isdigit()  # "$ 5 and $ 6"
    joined = before[-1:].isalnum() or behind[:1].isalnum() or behind[:1] == "$"
    if amount or joined or _NO_FORMULA.search(_COMMAND.sub(" ", content)):
        return -1
    return close + 1


def _brace_groups(text: str) -> list[tuple[int, int]]:
    """Ranges from each opening brace to its closing brace; unmatched braces are text."""
    ranges: list[tuple[int, int]] = []
    open_at: list[int] = []
    for match in _BRACES.finditer(text):
        at = match.start()
        if text[at] == "{":
            open_at.append(at)
        elif open_at:
            ranges.append((open_at.pop(), at + 1))
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
