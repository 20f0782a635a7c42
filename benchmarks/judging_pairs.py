"""Gold answers and answers with known verdicts, for judging.py and the tests.

From the golds in tests/pipelines/verifiers/judging/golds.txt four sets are made: each gold itself,
the same answer written differently, a changed answer, and the golds of other problems. The
rewritten answers are right and the others wrong by construction. Cases of Math-Verify's tests and
the answers that are kept apart are read from files in the same folder.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tests" / "pipelines" / "verifiers" / "judging"
CROSSED = 4

_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_WORD = re.compile(r"\\text\{([A-Za-z]+)\}")
_LETTER = re.compile(r"\\text\{\(([A-J])\)\}")
_UNIT = re.compile(r"\\(?:text|mbox)\{ ?([a-z]+)\}")
_TUPLE = re.compile(r"(\\left)?\(([^()]*)\)?")
_OPERATOR = re.compile(r"(?<=[0-9a-z)}])([+-])(?=[0-9a-z(\\])")


@dataclass(frozen=True)
class Case:
    """One answer to judge. A response is read first; an answer stands in a box."""

    gold: str
    answer: str
    right: bool
    is_response: bool = False
    is_choice: bool = False
    is_missed: bool = False  # a right answer that is refused, as is known

    @property
    def response(self) -> str:
        return self.answer if self.is_response else f"\\boxed{{{self.answer}}}"


def golds() -> dict[str, list[str]]:
    """Distinct gold answers by data set."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "golds.txt").read_text().splitlines():
        name, gold = line.split("\t")
        found.setdefault(name, []).append(gold)
    return found


def recorded(name: str) -> list[Case]:
    """The cases of a file: "math_verify_cases" or "held_out"."""
    rows = map(json.loads, (FOLDER / f"{name}.jsonl").read_text().splitlines())
    return [
        Case(
            row["gold"],
            row.get("response", row.get("answer")),
            row["expected"],
            "response" in row,
            row.get("choice", False),
            row.get("missed", False),
        )
        for row in rows
    ]


def own(gold: str) -> list[Case]:
    return [Case(gold, gold, True)]


def rewritten(gold: str) -> list[Case]:
    """The same answer in other notations."""
    return [
        Case(gold, text, True) for text in dict.fromkeys(_other_spellings(gold)) if text != gold
    ]


def perturbed(gold: str) -> list[Case]:
    """Other answers that look similar."""
    return [Case(gold, text, False) for text in dict.fromkeys(_near_misses(gold)) if text != gold]


def crossed(names: list[str]) -> list[Case]:
    """Each gold against the CROSSED next ones by spelling, where no two are the same answer."""
    ordered = sorted(names, key=lambda gold: (re.sub(r"\d+", "0", gold), gold))
    pairs = [
        (gold, other)
        for index, gold in enumerate(ordered)
        for other in ordered[index + 1 : index + 1 + CROSSED]
    ]
    return [Case(gold, other, False) for gold, other in pairs if {gold, other} not in _SAME]


# Golds that are next to each other in `crossed` and are one answer.
_SAME = [{"2,3,4", "2,4,3"}]


def _other_spellings(gold: str) -> Iterator[str]:
    is_word = bool(_WORD.fullmatch(gold) or _LETTER.fullmatch(gold))
    has_dollars = "$" in gold
    if not has_dollars:
        yield f"${gold}$"
        yield rf"\({gold}\)"
    if not is_word and not has_dollars:
        yield rf"\displaystyle {gold}"
        yield (
            gold.replace(" ", "")
            if not re.search(r"\\[a-zA-Z]+ [a-zA-Z]|\d \d|and|or", gold)
            else gold
        )
        yield _OPERATOR.sub(r" \1 ", gold)
        yield gold.replace(",", ", ") if not re.search(r"\d,\d{3}(?!\d)|,\\!|\{,\}", gold) else gold
        yield gold.replace(r"\frac", r"\dfrac")
        yield gold.replace(r"\frac", r"\tfrac")
        yield gold.replace(r"\pi", "π")
        yield _FRACTION.sub(r"\1/\2", gold) if _FRACTION.fullmatch(gold.strip("-")) else gold
        yield re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold)
        yield re.sub(r"\\left|\\right", "", gold)
        yield re.sub(r"^-\\frac\{(\d+)\}", r"\\frac{-\1}", gold)
        yield gold.replace("^\\circ", "^{\\circ}")
        yield gold.replace("pmatrix", "bmatrix")
        yield re.sub(r"_(\d+)$", r"_{\1}", gold)
        yield gold.replace(r"\$", "")
        if "\\left" not in gold:
            for size in ("\\left", "\\right"), ("\\bigl", "\\bigr"):
                yield gold.replace("(", size[0] + "(").replace(")", size[1] + ")")
    if _INTEGER.fullmatch(gold):
        yield f"{int(gold):,}"
        yield f"{gold}.00"
        yield f"{gold}."
        yield f"x = {gold}"
        yield rf"f(2) = {gold}"
        yield rf"{gold} \text{{ cm}}"
        yield rf"{gold}\,\mathrm{{cm}}^2"
        yield rf"{gold} \textnormal{{ square units}}"
        yield rf"\mathbf{{{gold}}}"
    if re.search(r"(\\pi|\\sqrt\{\d+\}|\\frac\{\d+\}\{\d+\})$", gold) and "," not in gold:
        yield rf"{gold} \text{{ cm}}^3"
        yield rf"{gold}\ \mathrm{{units}}"
        yield rf"{gold} \mbox{{ square units}}"
        yield rf"A = {gold}"
    unit = _UNIT.search(gold)
    if unit and not is_word:
        yield gold[: unit.start()].strip()
        yield gold.replace(r"\text", r"\mathrm").replace(r"\mbox", r"\textnormal")
    if word := _WORD.fullmatch(gold):
        yield word[1]
        yield word[1].upper()
        yield rf"\textbf{{{word[1]}}}"
        yield rf"\mathrm{{{word[1]}}}"
    if letter := _LETTER.fullmatch(gold):
        yield letter[1]
        yield f"({letter[1]})"
        yield rf"\textbf{{({letter[1]})}}"
    if re.fullmatch(r"-?[\d\\a-z{} ]+\\pm [\d\\a-z{} ]+", gold):
        first, second = gold.split(r"\pm")
        yield f"{first}+{second}, {first}-{second}"
        yield f"{first}-{second} \\text{{ and }} {first}+{second}"
    if re.fullmatch(r"-?\d+( *, *-?\d+)+", gold) and not re.search(r"\d,\d{3}(?!\d)", gold):
        values = gold.replace(" ", "").split(",")
        yield ", ".join(reversed(values))
        yield r" \text{ and } ".join(values)
        yield rf"\{{{', '.join(values)}\}}"
    if pair := re.fullmatch(r"\(([^(),]+),([^(),]+)\)", gold):
        yield f"(x,y) = ({pair[1]},{pair[2]})"
    if parts := re.fullmatch(r"(-?\d+) ?([+-]) ?(\d*i)", gold):
        yield f"{parts[2]}{parts[3]}{'' if parts[1].startswith('-') else '+'}{parts[1]}".lstrip("+")
        yield f"{parts[1]} {parts[2]} {parts[3].replace('i', ' i')}"


def _near_misses(gold: str) -> Iterator[str]:
    is_word = bool(_WORD.fullmatch(gold) or _LETTER.fullmatch(gold))
    yield rf"{gold} \text{{ or }} 1000003"
    yield f"{gold}, 1000003"
    yield "1000003"
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    for place in dict.fromkeys([*digits[:1], *digits[-1:]]):
        changed = str((int(gold[place]) + 1) % 10 or 1)
        yield gold[:place] + changed + gold[place + 1 :] if changed != gold[place] else gold
    if _INTEGER.fullmatch(gold):
        yield gold.removeprefix("-") if gold.startswith("-") else f"-{gold}" if int(gold) else gold
        yield f"{gold}0" if int(gold) else "10"
        yield f"{gold}.5"
        yield f"x + 1 = {gold}"
        yield rf"{gold}\pi" if int(gold) else r"\pi"
        yield rf"{gold}\text{{ and }}{int(gold) + 1}"
    if not is_word and not re.search(r"[,=<>$]|\\in|\\cup|\\text|matrix|_|\\pm|\\le", gold):
        yield f"-({gold})" if gold != "0" else "1"
        yield f"{gold} + 1"
    yield gold.replace(r"\pi", "") or gold
    yield re.sub(r"\\sqrt\{(\d+)\}", r"\1", gold)
    for old, new in ("[", "("), ("]", ")"):
        yield gold.replace(old, new)
    if re.search(r"\\infty|\\cup", gold) and not re.match(r"[^,]*infty", gold):
        yield gold.replace("(", "[", 1)
    if pair := re.fullmatch(r"\(([^(),]+),([^(),]+)\)", gold):
        yield f"({pair[2]},{pair[1]})"
    if re.fullmatch(r"\([^()]*,[^()]*\)", gold):
        yield gold.rpartition(",")[0] + ")"
    if re.fullmatch(r"-?\d+( *, *-?\d+)+", gold):
        yield gold.rpartition(",")[0]
    if letter := _LETTER.fullmatch(gold):
        yield gold.replace(f"({letter[1]})", "(J)" if letter[1] != "J" else "(A)")
    if _WORD.fullmatch(gold):
        yield r"\text{unrelated}"
    if re.fullmatch(r"[^=<>,$]*\\?i?[^=<>,$]*i", gold) and re.search(r"\d ?[+-]", gold):
        yield re.sub(r"(?<=\d) ?([+-])", lambda m: {"+": "-", "-": "+"}[m[1]], gold, count=1)
    if r"\pm" in gold:
        yield gold.replace(r"\pm", "+")


def sets(seed: int = 0, sample: int | None = None) -> dict[str, list[Case]]:
    """All sets by name. sample: so many golds of each data set only."""
    draw = random.Random(seed)
    found: dict[str, list[Case]] = {"math-verify's cases": recorded("math_verify_cases")}
    for name, all_of_it in golds().items():
        some = all_of_it
        if sample is not None and len(all_of_it) > sample:
            some = draw.sample(all_of_it, sample)
        for kind in (own, rewritten, perturbed):
            found[f"{name}: {kind.__name__}"] = [case for gold in some for case in kind(gold)]
        found[f"{name}: crossed"] = crossed(some)
    found["kept apart"] = recorded("held_out")
    return found
