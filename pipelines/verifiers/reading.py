"""Read final answers from responses, and compare those that need no computer algebra.

Called by the verify stage and the check of gold answers. Rewards are strict about what counts as an
answer: the last balanced `\\boxed{…}`, else the last explicit statement ("the answer is …",
"Answer: …", "#### …"). A last number alone is no answer: a policy must commit to one. Parts that
are joined by a comma, "and" or "or" are one answer, so a second guess is no right answer. What
stands behind the end of the thinking counts alone. All functions are linear in the response's
length.
"""

import re
from fractions import Fraction

from ...data.boxed import joint, last_boxes
from ...schemas.labels import AnswerKind
from .notation import plain_number

_THOUGHT_END = re.compile(
    r"</(?:think(?:ing)?|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
_STATEMENT = re.compile(r"\banswer\b(?:\s+is\b|\*{0,2}\s*[:=])|####|<answer>", re.IGNORECASE)
_FINAL_STATEMENT = re.compile(
    r"\bfinal\s+answer\b(?:\s+is\b|\*{0,2}\s*[:=])[\s:*]*(?=[$\d-]|\\[(\[])", re.IGNORECASE
)
_CHOICE_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is\b|\*{0,2}\s*[:=])|####|<answer>", re.IGNORECASE
)
_ADVERB = re.compile(
    r"(?:therefore|thus|hence|then|simply|just|indeed|clearly|equal to|given by)\b,?[\s:*]*",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9][0-9,./]*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
# Text after a statement's formula in which another part of the answer may stand.
_MAX_CLAUSE = 400

# Two values further apart than this differ in their sixth decimal, which math-verify compares.
_SURELY_APART = Fraction(2, 10**6)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

_LIST = re.compile(r"\s*(?:,|;|&|\band\b)\s*")
# Short words that are no products of variables; others of up to three letters may be: xyz = zyx.
_SHORT_WORDS = {"yes", "no", "odd", "all", "any"}

_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|normal)?|math(?:rm|bf|sf)|operatorname|mbox)\s*\{([^{}]*)\}"
)
_DELIMITER = re.compile(r"\\[()\[\]]|\\(?=\s)")
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

    The last balanced `\\boxed{…}` that is not empty, with the boxes that are joined to it; without
    one, the last explicit statement up to the end of its formula, sentence or line. A "final
    answer" that is stated behind the box counts more than the box.
    """
    text = visible(response)
    boxes = last_boxes(text)
    if boxes is None:
        answer = _stated(text)
    elif statements := list(_FINAL_STATEMENT.finditer(text, boxes.end)):
        answer = _statement(text[statements[-1].end() :])
    else:
        answer = boxes.answer
    # math-verify cannot read `42.`
    return answer.removesuffix(".") or None if answer is not None else None


def choice_letter(response: str) -> str | None:
    """The letter (A to J, upper case) that a response to a multiple-choice problem settles on.

    The last box if there is one, and then nothing else counts; else the last explicit statement
    ("Answer: C", "the answer is (C)"); else a last line that is only a letter. None if unclear.
    """
    text = visible(response)
    boxes = last_boxes(text)
    if boxes is not None:
        letters = {letter_of(part) for part in boxes.parts}
        return letters.pop() if len(letters) == 1 else None
    statements = list(_CHOICE_STATEMENT.finditer(text))
    if statements:
        stated = _without_adverb(text[statements[-1].end() :])
        line = _plain_text(stated.partition("\n")[0].partition("</answer>")[0])
        match = _LETTER_STATED.match(line)
        return match[1] if match else None
    last_line = text.rstrip().rpartition("\n")[2]
    match = _LETTER_LINE.fullmatch(_plain_text(last_line))
    return match[1] if match else None


def visible(response: str) -> str:
    """The text behind the end of the thinking; all of it if nothing stands there."""
    ends = list(_THOUGHT_END.finditer(response))
    behind = response[ends[-1].end() :] if ends else ""
    return behind if behind.strip() else response


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
    of words:
    math-verify reads a word as the product of its letters, so anagrams would be equal. Other
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
    marked = _TEXT_COMMAND.search(text) is not None
    named = sorted(_LIST.split(plain.casefold()))
    if not all(_WORDS.fullmatch(one) for one in named):
        return None
    letters = [word for one in named for word in re.split(r"[ '-]", one)]
    sure = sure or any(len(word) > (1 if marked else 3) or word in _SHORT_WORDS for word in letters)
    return named if sure else None


def _stated(response: str) -> str | None:
    statements = list(_STATEMENT.finditer(response))
    return _statement(response[statements[-1].end() :]) if statements else None


def _statement(text: str) -> str | None:
    """The answer at the start of a text: formulas that are joined, or a line's first sentence."""
    text = _without_adverb(text).partition("</answer>")[0]
    match = _FORMULA.match(text)
    if match:
        answer = _formulas(match, text[match.end() : match.end() + _MAX_CLAUSE])
    else:
        line = text.partition("\n")[0]
        end = _SENTENCE_END.search(line)
        answer = line[: end.start() if end else None].strip(" \t\r*")
    # A box here never closed: the response began an answer and did not finish it.
    return None if not answer or "\\boxed" in answer else answer


def _formulas(first: re.Match, rest: str) -> str:
    """A formula and the formulas or numbers that the rest of its sentence joins to it."""
    parts, alternatives = [_content(first)], False
    while part := _FORMULA.search(rest) or _NUMBER.search(rest):
        if (number := _NUMBER.search(rest, 0, part.start())) is not None:
            part = number
        between = rest[: part.start()]
        how = joint(between) if between.strip(" *") else None
        if how is None or (how == "and" and part.re is _NUMBER and "and" not in between):
            break
        alternatives |= how == "or"
        parts.append(_content(part))
        rest = rest[part.end() :]
    return (r" \text{ or } " if alternatives else ", ").join(parts)


def _content(match: re.Match) -> str:
    if match.re is _NUMBER:
        return match[0].rstrip(",./")
    return next(group for group in match.groups() if group is not None).strip()


def _without_adverb(text: str) -> str:
    text = text.lstrip(" \t\r\n*:")
    adverb = _ADVERB.match(text)
    return text[adverb.end() :] if adverb else text


def _plain_text(text: str) -> str:
    """Without text commands, dollar signs, emphasis and outer white space."""
    return _DELIMITER.sub("", _TEXT_COMMAND.sub(r"\1", text)).replace("$", "").strip(" \t\r\n*")
