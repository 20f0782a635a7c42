"""Pairs of gold and answer for verify.py: an ordinary mix, and the hostile ones of the tests."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from trace_opd.pipelines.verifiers.pool import Job

ROOT = Path(__file__).parents[1]
GOLDS, ANSWERS = 300, 4
# The mix of a hundred golds, as in collections of competition and school problems.
MIX = {
    "integer": 38, "fraction": 11, "decimal": 8, "radical": 9, "expression": 10, "tuple": 6,
    "set": 4, "interval": 4, "percentage": 3, "unit": 4, "text": 3,
}  # fmt: skip


def ordinary_pairs(seed: int) -> list[Job]:
    """GOLDS golds with ANSWERS answers each, about half of them correct; no pair twice."""
    draw = random.Random(seed)
    kinds = draw.choices(list(MIX), weights=list(MIX.values()), k=GOLDS)
    pairs: dict[Job, None] = {}
    for number, kind in enumerate(kinds):
        gold, answers = _KINDS[kind](draw, number)
        pairs |= dict.fromkeys(Job(gold, answer) for answer in draw.sample(answers, ANSWERS))
    jobs = list(pairs)
    draw.shuffle(jobs)
    return jobs


def _integer(draw: random.Random, number: int) -> tuple[str, list[str]]:
    n = draw.choice([draw.randint(-20, 120), draw.randint(100, 5000)]) + number
    spelled = [f"{n:,}", f"{n}.0", f"x = {n}", f"{n}", f"{n}"]
    return str(n), [*spelled, f"{n + 1}", f"{-n - 1}", f"{2 * n + 7}", rf"\frac{{{n}}}{{3}}", "n+1"]


def _fraction(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number + draw.randint(1, 40), draw.choice([7, 9, 11, 13, 16, 17, 23])
    gold = rf"\frac{{{a}}}{{{b}}}"
    right = [rf"\dfrac{{{a}}}{{{b}}}", f"{a}/{b}", rf"\frac{{{3 * a}}}{{{3 * b}}}", f"{a / b:.6f}"]
    return gold, [*right, rf"\frac{{{b}}}{{{a}}}", f"{a + 1}/{b}", f"{a / b:.2f}", f"-{a}/{b}"]


def _decimal(draw: random.Random, number: int) -> tuple[str, list[str]]:
    x = number + draw.randint(1, 99) / 100
    top = round(x * 100)
    right = [f"{x:.2f}", f"{x:.3f}", rf"\frac{{{top}}}{{100}}", rf"\approx {x:.2f}"[8:]]
    return f"{x:.2f}", [*right, f"{x + 0.01:.2f}", f"{x * 10:.1f}", f"{number}", rf"{number}\pi"]


def _radical(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number + 2, draw.choice([2, 3, 5, 6, 7])
    right = [
        rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{a} \cdot {b}^{{1/2}}",
        rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}",
    ]  # fmt: skip
    wrong = [rf"{b}\sqrt{{{a}}}", rf"{a}+\sqrt{{{b}}}", rf"\sqrt{{{a * b}}}", f"{a * b**0.5:.2f}"]
    return rf"{a}\sqrt{{{b}}}", right + wrong


def _expression(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number + 1, draw.randint(2, 9)
    right = [rf"(x+{a})(x+{b})", rf"x^2+{a + b}x+{a * b}", rf"x(x+{a + b})+{a * b}"]
    wrong = [rf"(x-{a})(x+{b})", rf"x^2+{a}x+{b}", rf"{a}x+{b}", rf"\frac{{x+{a}}}{{x+{b}}}"]
    return rf"x^2+{a + b}x+{a * b}", right + wrong


def _tuple(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number, draw.randint(2, 9)
    right = [f"({a}, {-b})", rf"\left({a},-{b}\right)", f"({a},-{2 * b}/2)"]
    return f"({a},{-b})", [*right, f"({-b},{a})", f"({a},{b})", f"{a}", f"({a},{-b},0)"]


def _set(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number, number + draw.randint(2, 9)
    right = [rf"\{{{b},{a}\}}", f"{a}, {b}", f"x={a}, x={b}", rf"{a} \text{{ and }} {b}"]
    return rf"\{{{a},{b}\}}", [*right, f"{a}", f"{a},{b + 1}", rf"\{{{a},{b},0\}}"]


def _interval(draw: random.Random, number: int) -> tuple[str, list[str]]:
    a, b = number, number + draw.randint(2, 9)
    right = [f"[{a},{b})", rf"\left[{a}, {b}\right)", rf"[\frac{{{2 * a}}}{{2}},{b})"]
    return f"[{a},{b})", [*right, f"({a},{b}]", f"[{a},{b}]", rf"[{a},\infty)", f"{a}"]


def _percentage(draw: random.Random, number: int) -> tuple[str, list[str]]:
    right = [rf"{number}\%", f"{number}", rf"{number}.0\%", f"{number} percent"]
    return rf"{number}\%", [*right, rf"{number + 1}\%", f"{number + 2}", rf"0.{number}\%"]


def _unit(draw: random.Random, number: int) -> tuple[str, list[str]]:
    right = [rf"{number}\text{{ cm}}", f"{number} cm", f"{number}", rf"{number}\ \mathrm{{cm}}"]
    return rf"{number}\text{{ cm}}", [*right, rf"{number + 1}\text{{ cm}}", rf"{number}\text{{ m}}"]


def _text(draw: random.Random, number: int) -> tuple[str, list[str]]:
    words = ["Tuesday", "parallel", "isosceles", "ellipse", "increasing", "Monday", "hyperbola"]
    gold = words[number % len(words)]
    return rf"\text{{{gold}}}", [gold, rf"\text{{{gold.lower()}}}", *words[:5], f"{number}"]


_KINDS: dict[str, Callable[[random.Random, int], tuple[str, list[str]]]] = {
    "integer": _integer, "fraction": _fraction, "decimal": _decimal, "radical": _radical,
    "expression": _expression, "tuple": _tuple, "set": _set, "interval": _interval,
    "percentage": _percentage, "unit": _unit, "text": _text,
}  # fmt: skip


def hostile_rows() -> list[tuple[Job, bool]]:
    """Gold and answer, and whether the answer may be judged correct."""
    file = ROOT / "tests" / "pipelines" / "verifiers" / "hostile_answers.jsonl"
    lines = file.read_text().splitlines()
    return [
        (Job(row["gold"], "".join(text * times for text, times in row["answer"])), "right" in row)
        for row in map(json.loads, lines)
    ]
