"""Multi-digit addition and subtraction with known intermediate steps: a built-in generator.

The source of kind `arithmetic`; the micro model is pretrained on it too. A right response writes
one line per digit, least significant first, with its carry or borrow, and boxes the result; for
`4821+3977` and `4821-3977`:

    1+7+0=8 c0          11-7-0=4 b1
    2+7+0=9 c0          12-7-1=4 b1
    8+9+0=17 c1         18-9-1=8 b1
    4+3+1=8 c0          4-3-1=0 b0
    \\boxed{8798}       \\boxed{844}
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...schemas.configs import ArithmeticSource
from ...schemas.labels import AnswerKind, DiagnosticType, Operation

ENDLESS = True
# Increase it when the rows of a config and seed change.
_GENERATOR_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One line of a response: its text, its value, its label, whether it is critical."""

    text: str
    value: str
    type: DiagnosticType
    key: bool


@dataclass(frozen=True)
class Column:
    """One digit's column.

    taken: carry or borrow from the column before; passed: carry or borrow to the next column;
    result: sum including the carry, or the digit of the difference.
    """

    a: int
    b: int
    taken: int
    result: int
    passed: int
    operation: Operation

    @property
    def text(self) -> str:
        if self.operation is Operation.ADD:
            return f"{self.a}+{self.b}+{self.taken}={self.result} c{self.passed}"
        return f"{self.a}-{self.b}-{self.taken}={self.result} b{self.passed}"

    @property
    def digit(self) -> int:
        return self.result % 10


def column(a: int, b: int, taken: int, operation: Operation) -> Column:
    """The right line for digits a and b with a carry or a borrow of `taken`, 0 or 1."""
    if operation is Operation.ADD:
        total = a + b + taken
        return Column(a, b, taken, total, total // 10, operation)
    borrowed = int(a - b - taken < 0)
    a += 10 * borrowed
    return Column(a, b, taken, a - b - taken, borrowed, operation)


def steps(left: int, right: int, operation: Operation = Operation.ADD) -> list[Step]:
    """The lines of a right response, the boxed result last; a subtraction needs left >= right.

    Lines that carry or borrow are the key steps, labelled case_analysis; the others are labelled
    arithmetic.
    """
    lines, taken = [], 0
    for a, b in digit_pairs(left, right):
        line = column(a, b, taken, operation)
        key = line.passed == 1
        kind = DiagnosticType.CASE_ANALYSIS if key else DiagnosticType.ARITHMETIC
        lines.append(Step(line.text, str(line.result), kind, key))
        taken = line.passed
    answer = str(left + right if operation is Operation.ADD else left - right)
    lines.append(Step(answer_text(answer), answer, DiagnosticType.FINAL_ANSWER, False))
    return lines


def digit_pairs(left: int, right: int) -> Iterator[tuple[int, int]]:
    """The digits of both numbers by column, least significant first."""
    width = max(len(str(left)), len(str(right)))
    columns = zip(reversed(str(left).zfill(width)), reversed(str(right).zfill(width)), strict=True)
    return ((int(a), int(b)) for a, b in columns)


def answer_text(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def operands(
    rng: random.Random, min_digits: int, max_digits: int, operation: Operation = Operation.ADD
) -> tuple[int, int]:
    """Two numbers of equal length, which is uniform over the range; for a subtraction the larger
    number is first."""
    width = rng.randint(min_digits, max_digits)
    low, high = 10 ** (width - 1), 10**width - 1
    left, right = rng.randint(low, high), rng.randint(low, high)
    if operation is Operation.SUBTRACT and left < right:
        return right, left
    return left, right


def rows(source: ArithmeticSource, seed: int) -> Iterator[dict]:
    """Distinct problems until all are drawn; the same seed gives the same stream."""
    operation = source.operation
    name = "" if operation is Operation.ADD else f"{operation}/"
    rng = random.Random(f"arithmetic/{name}{source.min_digits}/{source.max_digits}/{seed}")
    seen: set[tuple[int, int]] = set()
    counts = [9 * 10 ** (width - 1) for width in range(source.min_digits, source.max_digits + 1)]
    ordered = operation is Operation.SUBTRACT
    distinct = sum(n * (n + 1) // 2 if ordered else n * n for n in counts)
    while len(seen) < distinct:
        left, right = operands(rng, source.min_digits, source.max_digits, operation)
        if (left, right) in seen:
            continue
        seen.add((left, right))
        yield problem_row(left, right, operation) | {
            "source": f"arithmetic/{name}{source.min_digits}-{source.max_digits}"
        }


def identity(source: ArithmeticSource) -> dict[str, Any]:
    return source.semantic() | {"generator": _GENERATOR_VERSION}


def problem_row(left: int, right: int, operation: Operation) -> dict[str, Any]:
    """A row of table problems, without its source."""
    written = steps(left, right, operation)
    return {
        "problem": f"{left}{operation.sign}{right}",
        "answer": written[-1].value,
        "answer_kind": AnswerKind.MATH,
        "solution": "\n".join(step.text for step in written),
        "steps": [
            {"text": s.text, "value": s.value, "type": s.type, "key": s.key} for s in written
        ],
    }
