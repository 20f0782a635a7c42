"""Equations between numbers, `a op b … = c`, found in free text and checked exactly.

Called by the engine `rule` with match=value.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Repeats are bounded: open ones would make long runs of digits or terms quadratic.
_NUMBER = r"\$?(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,15})(?:\.\d{1,15})?%?"
_OPERATOR = r"\s*(?:[-+*/×÷−x]|\\times|\\cdot|\\div)\s*"
_EQUATION = re.compile(
    rf"(?<![\d.,])(?P<left>{_NUMBER}(?:{_OPERATOR}{_NUMBER}){{1,20}})\s*=\s*"
    rf"(?P<right>[-−]?{_NUMBER}(?:\s*/\s*{_NUMBER})?)"
)
_TERM = re.compile(rf"(?P<operator>{_OPERATOR})?(?P<number>{_NUMBER})")
_TIMES, _DIVIDED = {"*", "×", "x", "\\times", "\\cdot"}, {"/", "÷", "\\div"}
# The match is part of something longer, which can't be judged: `2y + 3 + 4 = 10`, `2^3 + 1 = 9`,
# `3 + 4 = 7 + 2`, `7 / 2 = 3 remainder 1`.
_BEFORE = re.compile(r"(?:[-+*/×÷−^(]|\\times|\\cdot|\\div)\s*\Z|[\w.,\\}]\Z|\bx\s\Z")
_AFTER = re.compile(r"\s*(?:[-+*/×÷−^(]|\\times|\\cdot|\\div|x\s*\d|r(?:em\w*)?\b|mod\b)|[.,]?\w")


@dataclass(frozen=True)
class Equation:
    """An equation stated in a text: its right side, and whether it holds."""

    result: Fraction
    holds: bool


def equations(text: str) -> Iterator[Equation]:
    """Equations whose left side is a chain of numbers and operators, in order.

    An equation that is ambiguous is skipped. A right side with decimals may be rounded.
    """
    for match in _EQUATION.finditer(text):
        before = text[max(0, match.start() - 10) : match.start()]
        if _BEFORE.search(before) or _AFTER.match(text, match.end()):
            continue
        right = match["right"]
        result = value(right)
        if result is None:
            continue
        try:
            exact = _chain(match["left"])
        except ZeroDivisionError:
            yield Equation(result, False)
            continue
        places = len(right.rstrip("%").partition(".")[2])
        slack = Fraction(1, 2 * 10**places) if places else Fraction(0)
        if right.endswith("%"):
            slack /= 100
        yield Equation(result, abs(exact - result) <= slack)


def value(text: str) -> Fraction | None:
    """The number that a short text writes: `1,200`, `$3.50`, `-4`, `3/4`, `20%`; None if none."""
    plain = text.strip().replace("−", "-").replace("$", "").replace(",", "")
    sign = -1 if plain.startswith("-") else 1
    parts = [part.strip() for part in plain.removeprefix("-").split("/")]
    if len(parts) > 2 or not all(re.fullmatch(r"\d+(\.\d+)?%?", part) for part in parts):
        return None
    numbers = [_number(part) for part in parts]
    if len(numbers) == 1:
        return sign * numbers[0]
    return sign * numbers[0] / numbers[1] if numbers[1] else None


def _number(text: str) -> Fraction:
    plain = text.replace(",", "").replace("$", "")
    if plain.endswith("%"):
        return Fraction(plain[:-1]) / 100
    return Fraction(plain)


def _chain(left: str) -> Fraction:
    """The value of `a op b op c …`, products before sums."""
    total, product = Fraction(0), Fraction(1)
    for term in _TERM.finditer(left):
        operator = (term["operator"] or "").strip()
        number = _number(term["number"])
        if operator in _TIMES:
            product *= number
        elif operator in _DIVIDED:
            product /= number
        else:
            total += product if term.start() else 0
            product = -number if operator in ("-", "−") else number
    return total + product
