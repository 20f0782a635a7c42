"""Multi-digit addition with known intermediate steps: the built-in generator.

A right response to `4821+3977` writes one line per digit, least significant first, and boxes the
sum:

    1+7+0=8 c0
    2+7+0=9 c0
    8+9+0=17 c1
    4+3+1=8 c0
    \\boxed{8798}
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...schemas.configs import ArithmeticSource
from ...schemas.labels import AnswerKind, DiagnosticType


@dataclass(frozen=True)
class Step:
    """One line of a response: its text, the value it sets, its label, whether it is critical."""

    text: str
    value: str
    type: DiagnosticType
    key: bool


def addition_steps(left: int, right: int) -> list[Step]:
    """The lines of a right response to `left+right`, the boxed sum last.

    Lines that carry are the key steps: their label is case_analysis, that of the others
    arithmetic.
    """
    steps, carry = [], 0
    width = max(len(str(left)), len(str(right)))
    for a, b in zip(_digits(left, width), _digits(right, width), strict=True):
        total = a + b + carry
        kind = DiagnosticType.CASE_ANALYSIS if total >= 10 else DiagnosticType.ARITHMETIC
        steps.append(Step(step_text(a, b, carry, total), str(total), kind, total >= 10))
        carry = total // 10
    answer = str(left + right)
    steps.append(Step(answer_text(answer), answer, DiagnosticType.FINAL_ANSWER, False))
    return steps


def step_text(a: int, b: int, carry: int, total: int, carry_out: int | None = None) -> str:
    return f"{a}+{b}+{carry}={total} c{total // 10 if carry_out is None else carry_out}"


def answer_text(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def operands(rng: random.Random, min_digits: int, max_digits: int) -> tuple[int, int]:
    """Two addends of the same number of digits, drawn evenly from the range of lengths."""
    width = rng.randint(min_digits, max_digits)
    low, high = 10 ** (width - 1), 10**width - 1
    return rng.randint(low, high), rng.randint(low, high)


def _digits(number: int, width: int) -> list[int]:
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def rows(source: ArithmeticSource, seed: int) -> Iterator[dict]:
    """Distinct problems until there are no more; the same seed gives the same stream."""
    rng = random.Random(f"arithmetic/{source.min_digits}/{source.max_digits}/{seed}")
    seen: set[tuple[int, int]] = set()
    widths = range(source.min_digits, source.max_digits + 1)
    distinct = sum((9 * 10 ** (width - 1)) ** 2 for width in widths)
    while len(seen) < distinct:
        left, right = operands(rng, source.min_digits, source.max_digits)
        if (left, right) in seen:
            continue
        seen.add((left, right))
        steps = addition_steps(left, right)
        yield {
            "problem": f"{left}+{right}",
            "answer": str(left + right),
            "answer_kind": AnswerKind.MATH,
            "solution": "\n".join(step.text for step in steps),
            "steps": [
                {"text": s.text, "value": s.value, "type": s.type, "key": s.key} for s in steps
            ],
            "source": f"arithmetic/{source.min_digits}-{source.max_digits}",
        }
