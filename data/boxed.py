"""The final answer in `\\boxed{}`, in solutions and responses of mathematics problems.

The sources of problems and the verifier call this. Boxes that are joined by a comma, "and" or "or"
are one answer in parts; of other boxes the last counts.
"""

import re
from dataclasses import dataclass

# An escaped character ("\{", "\\") is one token, so it neither opens a box nor counts as a brace.
# Each alternative begins with a plain character, so `re` skips to those.
_BRACES = re.compile(r"\\(?P<box>f?box(?:ed)?\s*\{)|\\.|\{|\}", re.DOTALL)
_VISIBLE = re.compile(r"\S")

# What may stand between two parts of an answer, without delimiters of formulas.
_MAX_BETWEEN = 120
_DELIMITERS = re.compile(
    r"\\(?:[()\[\],;:! ]|q?quad(?![A-Za-z]))|\\text(?:bf|rm|it|normal)?\s*(?=\{)|\\mbox\s*(?=\{)"
    r"|[{}$*~&\s]"
)
_SENTENCE_END = re.compile(r"[.!?:](?=\s|\$|\\|$)|\n\s*\n|\\\\")
# A verb or an adverb makes the text before the last box a step, not a part of the answer.
_STEP = re.compile(
    r"\b(?:is|are|was|were|be|so|then|thus|therefore|hence|because|since|but|not|no|wrong|gives?"
    r"|gets?|get|have|has|we|it|i|which|that|this|first|next|finally|check\w*|actually)\b",
    re.IGNORECASE,
)
_HEDGE = (
    r"(?:(?:maybe|perhaps|possibly|also|even|else|alternatively|equivalently|simply)(?:,?(?: |$)))?"
)
_JOINED = re.compile(
    r"(?:[\w(][\w()./^-]*(?: |(?=[,;/]))){0,6}?"
    r"\(?(?:(?P<or>,? ?\bor\b|/)|,? ?\b(?:and|as well as)\b|[,;])\(? ?"
    rf"{_HEDGE}\(?(?:[^\s=]{{1,30}}(?: \S{{1,10}})? ?(?:=|\\approx|\\in) ?)?",
    re.IGNORECASE,
)
_PART = re.compile(r"[,;]?(?: ?and)? ?\(?[a-z0-9]{1,3}\)", re.IGNORECASE)  # as (b)
_OR = re.compile(r"(?:^|[,;(] ?)or\b(?: \S+){0,4}$|\bor\b(?: \S+)?$", re.IGNORECASE)
# A second guess without a box, next to the last one.
_GUESS = r"(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|(-?[0-9](?:[0-9.,/]*[0-9])?(?:\s?\\?%)?))"
_GUESS_BEHIND = re.compile(rf"(?:[\s$]|\\[)\]])*[,(]?\s*or\s+{_HEDGE}\s*{_GUESS}", re.IGNORECASE)
_GUESS_BEFORE = re.compile(rf"{_GUESS},?\s+or\s+{_HEDGE}(?:[\s$]|\\[(\[])*$", re.IGNORECASE)


@dataclass(frozen=True)
class Boxes:
    """The parts of the last boxed answer. alternatives: an "or" joins them."""

    parts: tuple[str, ...]
    alternatives: bool
    end: int

    @property
    def answer(self) -> str:
        return (r" \text{ or } " if self.alternatives else ", ").join(self.parts)


def boxed_answer(text: str) -> str | None:
    """The last boxed answer of a text, of one box or several; None without a box.

    `\\boxed{-2} and \\boxed{3}` is `-2, 3`; `\\boxed{5} or \\boxed{6}` is `5 \\text{ or } 6`.
    """
    boxes = last_boxes(text)
    return boxes.answer if boxes else None


def last_boxes(text: str) -> Boxes | None:
    """The last balanced, non-empty `\\boxed{…}`, and those before it that belong to its answer.

    The outer one if they are nested. An unclosed box hides neither an earlier box nor one inside
    it.
    """
    found = _outer_boxes(text)
    if not found:
        return None
    parts = [text[slice(*found[-1].content)].strip()]
    alternatives = False
    for box, following in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        joined = joint(text[box.end : following.start])
        if joined is None:
            break
        alternatives |= joined == "or"
        part = text[slice(*box.content)].strip()
        if part not in parts:  # a repeated box is no second part
            parts.append(part)
    end = found[-1].end
    before = text[max(0, found[-1].start - _MAX_BETWEEN) : found[-1].start]
    behind = text[end : end + _MAX_BETWEEN]
    for guess in (_GUESS_BEHIND.match(behind), _GUESS_BEFORE.search(before)):
        if guess:
            parts.insert(0, next(filter(None, guess.groups())).strip())
            alternatives = True
    return Boxes(tuple(reversed(parts)), alternatives and len(parts) > 1, end)


def joint(between: str) -> str | None:
    """How two formulas with this text between them are one answer: "and", "or"; None if not."""
    if len(between) > _MAX_BETWEEN or _SENTENCE_END.search(between):
        return None
    plain = " ".join(_DELIMITERS.sub(" ", between).split())
    if not plain or _PART.fullmatch(plain):
        return "and"
    match = _JOINED.fullmatch(plain)
    if match and not _STEP.search(plain):
        return "or" if match["or"] else "and"
    return "or" if _OR.search(plain) else None


@dataclass(frozen=True)
class _Box:
    start: int
    content: tuple[int, int]
    end: int


def _outer_boxes(text: str) -> list[_Box]:
    """Balanced, non-empty boxes that are in no other, in order."""
    found: list[_Box] = []
    stack: list[tuple[int, int] | None] = []  # start and content of a box; None for other braces
    for match in _BRACES.finditer(text):
        if match["box"]:
            stack.append((match.start(), match.end()))
        elif match[0] == "{":
            stack.append(None)
        elif match[0] == "}" and stack:
            opened = stack.pop()
            if opened is None or not _VISIBLE.search(text, opened[1], match.start()):
                continue
            while found and found[-1].start > opened[0]:
                found.pop()
            found.append(_Box(opened[0], (opened[1], match.start()), match.end()))
    return found
