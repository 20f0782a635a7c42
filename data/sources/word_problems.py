"""Arithmetic word problems with known intermediate steps: a built-in generator.

The source of kind `word-problems`, called through `sources.rows` by stage problems. A template is a
story, the range of its numbers, and the operations that solve it. A problem's steps are the
operations as equations (`3 * 4 = 12`); its solution is a sentence for each and the boxed result.
"""

import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...schemas.configs import WordProblemsSource
from ...schemas.labels import AnswerKind
from ...schemas.labels import DiagnosticType as T
from .arithmetic import answer_text

ENDLESS = True
# Increase it when the rows of a config and seed change.
_GENERATOR_VERSION = 1
NAMES = ("Mia", "Ben", "Ava", "Tom", "Zoe", "Sam", "Lena", "Omar", "Priya", "Noah")
ITEMS = ("pencils", "apples", "marbles", "stickers", "cookies", "books", "shells", "cards")
LARGEST = 200
_SMALL = range(2, 10)
_NOTES = (20, 50, 100)
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Operation:
    """One step: operands are numbers of the story or earlier results (r1, r2).

    key: whether the solution depends on getting this step right.
    """

    meaning: str
    left: str
    sign: str
    right: str
    type: T
    key: bool = False


@dataclass(frozen=True)
class Template:
    """A story with fields for names, items and numbers, and the possible values of each number."""

    story: str
    numbers: dict[str, Sequence[int]]
    operations: tuple[Operation, ...]


def _template(story: str, numbers: dict[str, Sequence[int]], *operations: Operation) -> Template:
    return Template(story, numbers, operations)


TWO_STEPS = (
    _template(
        "{name} has {a} boxes with {b} {item} in each box. {name} gives {c} {item} to {other}. "
        "How many {item} does {name} have left?",
        {"a": _SMALL, "b": _SMALL, "c": range(2, 20)},
        Operation("{item} in all boxes", "a", "*", "b", T.SETUP),
        Operation("{item} left after giving some away", "r1", "-", "c", T.ARITHMETIC, True),
    ),
    _template(
        "{name} buys {a} {item} for {b} dollars each and pays with a {c} dollar note. "
        "How many dollars does {name} get back?",
        {"a": _SMALL, "b": _SMALL, "c": _NOTES},
        Operation("dollars for all {item}", "a", "*", "b", T.ARITHMETIC),
        Operation("dollars of change", "c", "-", "r1", T.SIGN_OR_BOUND, True),
    ),
    _template(
        "{name} has {a} {item}. {other} has {b} times as many {item} as {name}. "
        "How many {item} do they have together?",
        {"a": _SMALL, "b": range(2, 7)},
        Operation("{item} of {other}", "a", "*", "b", T.ALGEBRA_MANIPULATION, True),
        Operation("{item} of both", "a", "+", "r1", T.ARITHMETIC),
    ),
    _template(
        "{name} collects {a} {item} on Monday and {b} {item} on Tuesday, and shares them equally "
        "among {c} friends. How many {item} does each friend get?",
        {"a": range(2, 30), "b": range(2, 30), "c": range(2, 8)},
        Operation("{item} of both days", "a", "+", "b", T.SETUP),
        Operation("{item} for each friend", "r1", "/", "c", T.ARITHMETIC, True),
    ),
    _template(
        "A bus carries {a} people. At the next stop {b} people get off and {c} people get on. "
        "How many people are on the bus now?",
        {"a": range(10, 50), "b": _SMALL, "c": _SMALL},
        Operation("people after some get off", "a", "-", "b", T.SIGN_OR_BOUND, True),
        Operation("people after some get on", "r1", "+", "c", T.ARITHMETIC),
    ),
    _template(
        "A garden is a rectangle, {a} metres long and {b} metres wide. "
        "How many metres of fence go all the way around it?",
        {"a": range(3, 30), "b": range(3, 30), "sides": (2,)},
        Operation("metres of one long and one short side", "a", "+", "b", T.ARITHMETIC),
        Operation("metres of all four sides", "r1", "*", "sides", T.THEOREM_APPLICATION, True),
    ),
    _template(
        "{name} works {a} hours on Saturday and {b} hours on Sunday, and earns {c} dollars per "
        "hour. How many dollars does {name} earn on both days?",
        {"a": _SMALL, "b": _SMALL, "c": range(3, 12)},
        Operation("hours on both days", "a", "+", "b", T.SETUP, True),
        Operation("dollars for all hours", "r1", "*", "c", T.ARITHMETIC),
    ),
    _template(
        "{name} buys {a} dozen {item} and uses {b} of them. How many {item} are left?",
        {"a": range(2, 8), "b": range(2, 24), "dozen": (12,)},
        Operation("{item} in the dozens", "a", "*", "dozen", T.UNIT_OR_DOMAIN, True),
        Operation("{item} left", "r1", "-", "b", T.ARITHMETIC),
    ),
)

THREE_STEPS = (
    _template(
        "{name} buys {a} {item} for {b} dollars each and {c} notebooks for {d} dollars each. "
        "How many dollars does {name} pay in all?",
        {"a": _SMALL, "b": _SMALL, "c": _SMALL, "d": _SMALL},
        Operation("dollars for the {item}", "a", "*", "b", T.ARITHMETIC),
        Operation("dollars for the notebooks", "c", "*", "d", T.ARITHMETIC),
        Operation("dollars in all", "r1", "+", "r2", T.SETUP, True),
    ),
    _template(
        "{name} fills {a} trays with {b} {item} each, gives {c} {item} away and packs the rest "
        "into bags of {d}. How many bags does {name} fill?",
        {"a": _SMALL, "b": _SMALL, "c": range(2, 20), "d": range(2, 8)},
        Operation("{item} on all trays", "a", "*", "b", T.SETUP),
        Operation("{item} left to pack", "r1", "-", "c", T.SIGN_OR_BOUND, True),
        Operation("bags", "r2", "/", "d", T.ARITHMETIC),
    ),
    _template(
        "{name} saves {a} dollars every week for {b} weeks, then spends {c} dollars and later "
        "finds {d} dollars. How many dollars does {name} have now?",
        {"a": _SMALL, "b": _SMALL, "c": range(2, 30), "d": _SMALL},
        Operation("dollars saved", "a", "*", "b", T.SETUP),
        Operation("dollars after spending", "r1", "-", "c", T.SIGN_OR_BOUND, True),
        Operation("dollars now", "r2", "+", "d", T.ARITHMETIC),
    ),
    _template(
        "{name} has {a} {item}. {other} has {b} times as many {item} as {name}. {third} has {c} "
        "{item} fewer than {other}. How many {item} do {other} and {third} have together?",
        {"a": _SMALL, "b": range(2, 6), "c": _SMALL},
        Operation("{item} of {other}", "a", "*", "b", T.ALGEBRA_MANIPULATION, True),
        Operation("{item} of {third}", "r1", "-", "c", T.SIGN_OR_BOUND),
        Operation("{item} of {other} and {third}", "r1", "+", "r2", T.ARITHMETIC),
    ),
    _template(
        "A train has {a} cars with {b} seats each. At the first station {c} people take a seat, "
        "at the second station {d} more. How many seats are free?",
        {"a": _SMALL, "b": range(6, 20), "c": range(5, 40), "d": range(5, 40)},
        Operation("seats of the train", "a", "*", "b", T.COUNTING),
        Operation("people on the train", "c", "+", "d", T.ARITHMETIC),
        Operation("free seats", "r1", "-", "r2", T.SETUP, True),
    ),
    _template(
        "{name} works {a} hours on Saturday and {b} hours on Sunday for {c} dollars per hour, and "
        "spends {d} dollars of it. How many dollars are left?",
        {"a": _SMALL, "b": _SMALL, "c": range(3, 12), "d": range(2, 40)},
        Operation("hours on both days", "a", "+", "b", T.SETUP, True),
        Operation("dollars for all hours", "r1", "*", "c", T.ARITHMETIC),
        Operation("dollars left", "r2", "-", "d", T.SIGN_OR_BOUND),
    ),
    _template(
        "A floor is {a} metres long and {b} metres wide. Tiles cost {c} dollars per square metre, "
        "and bringing them costs {d} dollars. How many dollars does the floor cost?",
        {"a": _SMALL, "b": _SMALL, "c": range(2, 6), "d": range(5, 30)},
        Operation("square metres", "a", "*", "b", T.THEOREM_APPLICATION, True),
        Operation("dollars for the tiles", "r1", "*", "c", T.UNIT_OR_DOMAIN),
        Operation("dollars in all", "r2", "+", "d", T.ARITHMETIC),
    ),
)


def rows(source: WordProblemsSource, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream; the same seed gives the same stream. Problems may repeat."""
    templates = {2: TWO_STEPS, 3: THREE_STEPS}[source.steps]
    rng = random.Random(f"word-problems/{source.steps}/{seed}")
    while True:
        template = rng.choice(templates)
        name, other, third = rng.sample(NAMES, 3)
        words = {"name": name, "other": other, "third": third, "item": rng.choice(ITEMS)}
        numbers, equations = _solvable(rng, template)
        steps = [
            {"text": text, "value": str(value), "type": operation.type, "key": operation.key}
            for operation, (text, value) in zip(template.operations, equations, strict=True)
        ]
        sentences = [
            f"{meaning[0].upper()}{meaning[1:]}: {step['text']}."
            for operation, step in zip(template.operations, steps, strict=True)
            for meaning in [operation.meaning.format(**words)]
        ]
        answer = steps[-1]["value"]
        yield {
            "problem": template.story.format(**words, **numbers),
            "answer": answer,
            "answer_kind": AnswerKind.MATH,
            "solution": "\n".join([*sentences, answer_text(answer)]),
            "steps": steps,
            "source": f"word-problems/{source.steps}",
        }


def identity(source: WordProblemsSource) -> dict[str, Any]:
    return source.semantic() | {"generator": _GENERATOR_VERSION}


def _solvable(
    rng: random.Random, template: Template
) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Numbers for which every operation is valid, and the operations as (equation, result)."""
    while True:
        numbers = {name: rng.choice(values) for name, values in template.numbers.items()}
        if (equations := _equations(template.operations, numbers)) is not None:
            return numbers, equations


def _equations(
    operations: tuple[Operation, ...], numbers: dict[str, int]
) -> list[tuple[str, int]] | None:
    """None unless all results are distinct positive integers, at most LARGEST.

    Because results are distinct, the rule annotator can match a sentence to a step by its value.
    """
    known = dict(numbers)
    equations: list[tuple[str, int]] = []
    for index, operation in enumerate(operations, start=1):
        left, right = known[operation.left], known[operation.right]
        if operation.sign == "/" and left % right:
            return None
        result = _SIGNS[operation.sign](left, right)
        if not 0 < result <= LARGEST or any(result == value for _, value in equations):
            return None
        known[f"r{index}"] = result
        equations.append((f"{left} {operation.sign} {right} = {result}", result))
    return equations
