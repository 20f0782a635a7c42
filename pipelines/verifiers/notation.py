"""The notation of an answer, checked before it is read as mathematics. Called by math.py and
worker.py.

math-verify drops units, bases, shapes of brackets and dots, evaluates any expression, and picks a
formula out of a sentence. `prepare` leaves it one formula to read; `conflict` finds differences
that no later comparison would see. docs/decisions/own-verification-workers.md lists the cases. Text
only, linear in the answer's length, without sympy.
"""

import re
from fractions import Fraction
from functools import lru_cache

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)"
_PLAIN = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<number>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<top>[0-9]+)/(?P<bottom>0*[1-9][0-9]*)"
    r"|\\[dt]?frac\{(?P<minus>-?)(?P<over>[0-9]+)\}\{(?P<under>0*[1-9][0-9]*)\})"
)
# Longer numbers are left to math-verify: Python limits the length of integers in text.
_MAX_DIGITS = 40

_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "°": r"^\circ ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "≈": r"\approx ",
    "π": r"\pi ", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
}  # fmt: skip
_TO_LATEX = str.maketrans(_SYMBOLS)
_WRAPPINGS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{1,15})\.([0-9]{0,15})\\(?:overline|bar|dot)\s*\{([0-9]{1,15})\}"
)

_GROUPED = re.compile(r"-?[1-9][0-9]{0,2}(?:(?:[ ~]|\\[ ,;:!]|,\\!)\s*[0-9]{3})+(?:\.[0-9]+)?")
_SEPARATOR = re.compile(r"[^0-9.-]+")
_SCIENTIFIC = re.compile(r"(-?[0-9]{1,30}(?:\.[0-9]{1,30})?)[eE]([+-]?[0-9]{1,4})")

_SPACE = r"(?:\s|~|\\[ ,;:!])*"
_TEXT = r"\\(?:text(?:rm|bf|it)?|mathrm|mbox|operatorname)\s*"
_POWER = r"(?:\^\s*\{?\s*([0-9])\s*\}?)?"
_UNIT_IN_TEXT = re.compile(rf"{_SPACE}{_TEXT}\{{([^{{}}0-9\\]*)\}}{_SPACE}{_POWER}{_SPACE}$")
_BARE_UNIT = re.compile(
    rf"(?P<space>{_SPACE})(?P<unit>[A-Za-z][A-Za-z./ -]*?){_SPACE}{_POWER}{_SPACE}$"
)
_VALUE_END = re.compile(r"[0-9})\]%.]$")
# What may precede a unit that is not marked as text: a number, not a product of variables.
_NUMERIC = re.compile(
    r"(?:[-+0-9.,/(){}^ ]|\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right|[ ,;:!]))+$"
)
_NO_UNIT = {"or", "and", "not", "no", "isn't", "is", "to", "but", "maybe", "rather", "wrong", "if"}

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "mg": "milligram", "g": "gram gm", "kg": "kilogram", "lb": "",
    "s": "sec second", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "",
    "year": "yr", "ml": "milliliter millilitre", "l": "liter litre", "mph": "", "dollar": "",
    "cent": "", "degree": "deg", "rad": "radian",
}  # fmt: skip
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in [unit, *names.split()]}
_SHORT_WORDS = {"per", "sq", "of", "cu", "the", "a", "an", "ways", "men", "boys", "pm", "am"}

_BASE = re.compile(r"[0-9A-Fa-f]+\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))")
# math-verify drops a number's subscript, as in Python's 5_000.
_SUBSCRIPTED = re.compile(r"(?<![A-Za-z0-9_])[0-9]+\s*_\s*\{?[0-9]")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})$")
_DOTS = re.compile(r"\\[lcd]?dots|\.\.\.|…")
_EQUALS = re.compile(r"\\.|[{}]|(?<![<>!:])=", re.DOTALL)
_OPERATOR = re.compile(
    r"\\(i*int|oint|sum|prod|lim|gcd|lcm|det|max|min|partial|[bp]?mod)(?![A-Za-z])"
    r"|\\(operatorname)\s*\{(?!a)|\\[dt]?frac\s*\{?\s*(d)\s*\}?\s*\{\s*d\s*[a-z\\]|\\begin\{([vV])matrix"
)
_ARITHMETIC = re.compile(
    r"(?:[0-9.\s+*/()-]|\\(?:cdot|times|div|left|right|[ ,;:!])"
    r"|\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\})+$"
)
_BINARY = re.compile(r"[0-9)}]\s*(?:[+*(-]|\\(?:cdot|times|div|left)|/.*/)")


def plain_number(text: str) -> Fraction | None:
    """Exact value of a plain integer, decimal or fraction of integers; None for all else."""
    match = _PLAIN.fullmatch(text)
    if match is None or len(text) > _MAX_DIGITS:
        return None
    if match["number"]:
        value = Fraction(match["number"].replace("{,}", "").replace(",", ""))
    else:
        value = Fraction(int(match["top"] or match["over"]), int(match["bottom"] or match["under"]))
    return -value if (match["sign"] == "-") != (match["minus"] == "-") else value


@lru_cache(maxsize=1024)
def prepare(text: str) -> str | None:
    """The one formula in an answer, without its unit; None if there is a box inside.

    math-verify would pick one of nested boxes, or a box next to other text: an answer could show
    one number and be graded on another. The same holds for a subscript that is no base.
    """
    text = _unwrapped(text)
    if "\\boxed" in text or "\\fbox" in text:
        return None
    if _SUBSCRIPTED.search(text) and not _BASE.fullmatch(text):
        return None
    if not text.isascii():
        text = text.translate(_TO_LATEX)
    text = _REPEATING.sub(_as_fraction, text)
    value = _split_unit(text)[0].removeprefix("+")
    if _GROUPED.fullmatch(value):
        return _SEPARATOR.sub("", value)
    return _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", value) if _SCIENTIFIC.fullmatch(value) else value


def conflict(gold: str, answer: str) -> bool:
    """Whether the notations alone prove that the answer is not the gold's.

    Bases, known units, a set against a tuple, clock times, dots on one side only, an operation
    that the answer leaves undone and the gold does not have.
    """
    gold, answer = _unwrapped(gold), _unwrapped(answer)
    return (
        _differ(_base(gold), _base(answer))
        or _differ(_unit(gold), _unit(answer))
        or {_bracket(gold), _bracket(answer)} == {"{", "("}
        or _differ(_clock(gold), _clock(answer))
        or bool(_DOTS.search(gold)) != bool(_DOTS.search(answer))
        or _undone(gold, _last_side(answer))
    )


def _unwrapped(text: str) -> str:
    """Without dollar signs or a box around all of it."""
    text = text.strip()
    for _ in range(4):  # nobody nests deeper than a box in dollars in a box
        inner = _inside(text)
        if inner is None:
            break
        text = inner.strip()
    return text


def _inside(text: str) -> str | None:
    for left, right in _WRAPPINGS:
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            # `$5$ and $6$` is no formula in dollars; `\$5` begins with no dollar sign.
            if left[0] not in inner.replace("\\$", "") if left[0] == "$" else left not in inner:
                return inner
    box = _BOX.match(text)
    return text[box.end() : -1] if box and _closes_at_end(text, box.end()) else None


def _closes_at_end(text: str, start: int) -> bool:
    """Whether the brace opened before `start` is closed by the last character."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.end() == len(text)
    return False


def _as_fraction(match: re.Match) -> str:
    """`0.1\\overline{6}` as a fraction."""
    whole, fixed, repeated = match.groups()
    bottom = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return f"\\frac{{{top}}}{{{bottom}}}"


def _split_unit(text: str) -> tuple[str, str | None]:
    """The value and its unit's words with their power, as in "cm^2"."""
    if text.startswith("\\$"):
        return text[2:].strip(), "dollar"
    tail = text[-100:]
    match = _UNIT_IN_TEXT.search(tail)
    if match:
        words, power, marked = match[1], match[2], True
    else:
        match = _BARE_UNIT.search(tail)
        if match is None:
            return text, None
        words, power, marked = match["unit"], match[3], False
    value = text[: len(text) - len(tail) + match.start()].strip()
    if not _VALUE_END.search(value) or not _reads_as_unit(words):
        return text, None
    if not marked and not (
        _NUMERIC.fullmatch(value) and _is_bare_unit(words, spaced=bool(match["space"]))
    ):
        return text, None
    return value, f"{words.strip().lower()}^{power or 1}"


def _reads_as_unit(words: str) -> bool:
    """False for "or seven" and the like: an answer must not name a second one."""
    named = words.lower().replace("-", " ").split()
    return len(named) <= 6 and not _NO_UNIT & set(named)


def _is_bare_unit(words: str, spaced: bool) -> bool:
    """A word that cannot be a product of variables, or a known unit; one letter needs a space."""
    named = words.lower().split()
    if not spaced:
        return len(named) == 1 and len(named[0]) > 1 and _known(named[0]) is not None
    return all(len(w) > 3 or w in _SHORT_WORDS or _known(w.strip(".")) for w in named)


def _known(word: str) -> str | None:
    return _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s"))


@lru_cache(maxsize=1024)
def _unit(text: str) -> str | None:
    """The canonical name of a known unit; only known units can contradict each other."""
    words = _split_unit(text)[1]
    if words is None:
        return None
    name, _, power = words.partition("^")
    named = name.split()
    if len(named) == 2 and named[0] in {"square", "sq", "cubic", "cu"}:
        named, power = named[1:], "2" if named[0].startswith("s") else "3"
    unit = _known(named[0].strip(".")) if len(named) == 1 else None
    return f"{unit}^{power or 1}" if unit else None


def _differ(first: object, second: object) -> bool:
    return first is not None and second is not None and first != second


def _base(text: str) -> str | None:
    match = _BASE.fullmatch(text)
    return (match[1] or match[2]).lstrip("0") if match else None


def _bracket(text: str) -> str | None:
    text = text.replace("\\left", "").replace("\\right", "").replace("\\lbrace", "\\{").strip()
    if text.startswith("\\{") and text.endswith(("\\}", "\\rbrace")):
        return "{"
    return "(" if text.startswith("(") and text.endswith(")") and "," in text else None


def _clock(text: str) -> tuple[int, int] | None:
    match = _CLOCK.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def _last_side(text: str) -> str:
    """The text after the last equals sign outside braces."""
    depth = start = 0
    for match in _EQUALS.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "=" and depth == 0:
            start = match.end()
    return text[start:].strip()


def _undone(gold: str, answer: str) -> bool:
    """Whether the answer is a task rather than its result: a sum that is not worked out."""
    if _operators(answer) - _operators(gold):
        return True
    return (
        plain_number(gold) is not None
        and _ARITHMETIC.fullmatch(answer) is not None
        and _BINARY.search(answer) is not None
    )


def _operators(text: str) -> set[str]:
    return {next(filter(None, match.groups())) for match in _OPERATOR.finditer(text)}
