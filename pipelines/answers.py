"""Final answers read from responses, and the comparisons that need no computer algebra.

Rewards are strict about what counts as an answer: the last balanced `\\boxed{…}`, else the last
explicit statement ("the answer is …", "Answer: …", "#### …"). A number that merely stands last is
no answer: a policy must commit to one. Everything here is linear in the response's length.
"""

import re

from ..data.boxed import last_boxed
from ..schemas.labels import AnswerKind

_STATEMENT = re.compile(r"\banswer\b(?:\s+is\b|\*{0,2}\s*[:=])|####", re.IGNORECASE)
_FORMULA = re.compile(r"\$+([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_PLAIN = re.compile(
    r"[+-]?(?:\d{1,18}(?:\.\d{1,18})?(?:/[1-9]\d{0,17})?|\\[dt]?frac\{\d+\}\{[1-9]\d*\})"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
# A letter, perhaps in brackets, perhaps with the choice's text after it; never two letters.
_LETTER = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Ja-j])\)(?!\s*(?:,|&|and\b|or\b))|([A-Ja-j])(?=[.:)]|$))"
)
_LETTER_STATED = re.compile(
    r"(?:(?:option|choice)\s+)?\(?([A-J])(?:[.:;)*]|\s*$|\s+(?:because|since|as)\b)"
)
_LETTER_LINE = re.compile(r"\(?([A-J])\)?[.:]?")


def final_answer(response: str) -> str | None:
    """The final answer of a response to a mathematics problem; None if it commits to none.

    The last balanced `\\boxed{…}` that is not empty; without one, what the last explicit statement
    says up to the end of its formula, sentence or line.
    """
    boxed = last_boxed(response)
    answer = boxed if boxed is not None else _stated(response)
    # math-verify cannot read `42.`
    return answer.removesuffix(".") or None if answer is not None else None


def choice_letter(response: str) -> str | None:
    """The letter (A to J, upper case) that a response to a multiple-choice problem settles on.

    The last box if there is one, and then nothing else counts; else the last explicit statement
    ("Answer: C", "the answer is (C)"); else a last line that is only a letter. None if unclear.
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return letter_of(boxed)
    statements = list(_STATEMENT.finditer(response))
    if statements:
        text = response[statements[-1].end() :].lstrip(" \t\r\n*:$")
        line = _plain_text(text.partition("\n")[0])
        match = _LETTER_STATED.match(line)
        return match[1] if match else None
    last_line = response.rstrip().rpartition("\n")[2]
    match = _LETTER_LINE.fullmatch(_plain_text(last_line))
    return match[1] if match else None


def letter_of(text: str) -> str | None:
    """The choice that a gold answer or a box's content names: "C", "(c)", "C. 5 m", "\\text{C}"."""
    match = _LETTER.match(_plain_text(text))
    return (match[1] or match[2]).upper() if match else None


def gold_parses(answer: str, kind: AnswerKind) -> bool:
    """Whether a gold answer can be compared with: as a choice's letter, or as mathematics."""
    if kind == AnswerKind.CHOICE:
        return letter_of(answer) is not None
    answer = answer.strip()
    if _PLAIN.fullmatch(answer) or _words(answer):
        return True
    # Importing sympy takes about half a second: only callers with such golds pay for it.
    from .verify_worker import parse_answer

    return bool(parse_answer(answer))


def exact_match(gold: str, answer: str) -> bool | None:
    """Compare as strings where strings decide; None where it takes computer algebra.

    They decide for two plain integers, for equal plain numbers or fractions, and for a gold made
    of words: math-verify reads a word as the product of its letters, so that anagrams are equal.
    Other equal strings are left to the worker: whether the gold parses at all must not depend on
    the response, or only right ones would be scored.
    """
    gold, answer = gold.strip(), answer.strip()
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    if gold == answer and _PLAIN.fullmatch(gold):
        return True
    words = _words(gold)
    return words == _words(answer) if words else None


def _words(text: str) -> str | None:
    """Words in lower case if the text is nothing else, and not a product of variables."""
    text = _plain_text(text)
    longest = max((len(word) for word in re.split(r"[ '-]", text)), default=0)
    # Up to three letters may be variables: xyz = zyx.
    return text.casefold() if longest > 3 and _WORDS.fullmatch(text) else None


def _stated(response: str) -> str | None:
    statements = list(_STATEMENT.finditer(response))
    if not statements:
        return None
    text = response[statements[-1].end() :].lstrip(" \t\r\n*:")
    if match := _FORMULA.match(text):
        answer = next(group for group in match.groups() if group is not None).strip()
    else:
        line = text.partition("\n")[0]
        end = _SENTENCE_END.search(line)
        answer = line[: end.start() if end else None].strip(" \t\r*")
    # A box here is one that never closed: the response was about to answer and did not.
    return None if not answer or "\\boxed" in answer else answer


def _plain_text(text: str) -> str:
    """Without text commands, dollar signs, emphasis and outer white space."""
    return _TEXT_COMMAND.sub(r"\1", text).strip(" \t\r\n*$")
