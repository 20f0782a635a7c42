"""Read final answers from responses, and compare those that need no computer algebra.

Called by the verify stage and the check of gold answers. Rewards are strict about what counts as an
answer: the last balanced `\\boxed{…}`, else the last explicit statement ("the answer is …",
"Answer: …", "#### …"). A last number alone is no answer: a policy must commit to one. All functions
are linear in the response's length.
"""

import re
from fractions import Fraction

from ...data.boxed import last_boxed
from ...schemas.labels import AnswerKind
from .notation import plain_number

_STATEMENT = re.compile(r"\banswer\b(?:\s+is\b|\*{0,2}\s*[:=])|####", re.IGNORECASE)
_FORMULA = re.compile(r"\$+([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

# Two values further apart than this differ in their sixth decimal, which math-verify compares.
_SURELY_APART = Fraction(2, 10**6)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

_LIST = re.compile(r"\s*(?:,|;|&|\band\b)\s*")
# Short words that are no products of variables; others of up to three letters may be: xyz = zyx.
_SHORT_WORDS = {"yes", "no", "odd", "all", "any"}

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

    The last balanced `\\boxed{…}` that is not empty; without one, the last explicit statement up to
    the end of its formula, sentence or line.
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


def gold_parses(answer: str, kind: AnswerKind) -> bool | None:
    """Whether a gold answer can be read: as a choice's letter, or as mathematics.

    None where only a verification worker can read it: it may be as hostile as any answer.
    """
    if kind == AnswerKind.CHOICE:
        return letter_of(answer) is not None
    if kind == AnswerKind.TEXT:
        return bool(answer.strip())
    answer = answer.strip()
    return True if plain_number(answer) is not None or _words(answer) else None


def exact_match(gold: str, answer: str) -> bool | None:
    """Compare without computer algebra where that decides; None where it does not.

    It decides for two plain numbers, except for decimals that agree in six places, and for a gold
    of
    words: math-verify reads a word as the product of its letters, so anagrams would be equal. Other
    equal strings are left to the worker: whether the gold parses must not depend on the response,
    or only right responses would be scored.
    """
    gold, answer = gold.strip(), answer.strip()
    number = plain_number(gold)
    if number is not None:
        other = plain_number(answer)
        return None if other is None else _same_number(number, other, "." in gold + answer)
    words = _words(gold)
    return words == _words(answer, sure=True) if words else None


def _same_number(gold: Fraction, answer: Fraction, decimal: bool) -> bool | None:
    if gold == answer:
        return True
    return None if decimal and abs(gold - answer) <= _SURELY_APART else False


def _words(text: str, sure: bool = False) -> list[str] | None:
    """Words, or a list of them in any order, in lower case.

    None for other text, and for words that may be a product of variables unless `sure`.
    """
    plain = _plain_text(text)
    marked = text.lstrip("$ ").startswith("\\") and plain != text.strip(" $")
    named = sorted(_LIST.split(plain.casefold()))
    if not all(_WORDS.fullmatch(one) for one in named):
        return None
    letters = [word for one in named for word in re.split(r"[ '-]", one)]
    sure = sure or any(len(word) > (1 if marked else 3) or word in _SHORT_WORDS for word in letters)
    return named if sure else None


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
    # A box here never closed: the response began an answer and did not finish it.
    return None if not answer or "\\boxed" in answer else answer


def _plain_text(text: str) -> str:
    """Without text commands, dollar signs, emphasis and outer white space."""
    return _TEXT_COMMAND.sub(r"\1", text).strip(" \t\r\n*$")
