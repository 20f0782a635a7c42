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
from itertools import product

from .units import split_unit, unit_of, without_inner_units

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)"
_PLAIN = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<number>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<top>[0-9]+)/(?P<bottom>0*[1-9][0-9]*)"
    r"|\\[dt]?frac\{(?P<minus>-?)(?P<over>[0-9]+)\}\{(?P<under>0*[1-9][0-9]*)\})"
)
_PLAIN_DECIMAL = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?")
# Longer numbers are left to math-verify: Python limits the length of integers in text.
_MAX_DIGITS = 40

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "°": r"^\circ ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∅": r"\emptyset ",
    "π": r"\pi ", "²": "^2", "³": "^3", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
}  # fmt: skip
_TO_LATEX = str.maketrans(_SYMBOLS)
_WRAPPINGS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{1,15})\.([0-9]{0,15})\\(?:overline|bar|dot)\s*\{([0-9]{1,15})\}"
)

_SIZED = re.compile(
    r"\\(?:[bB]igg?[lrm]?|middle|mleft|mright|displaystyle|textstyle)(?![A-Za-z])\s*"
)
# One sign or command in place of its synonyms.
_SYNONYMS = [
    (re.compile(r"\\lbrace(?![A-Za-z])\s*"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"\\q?quad"), " "),
    (re.compile(r"\\(?:text|mathrm)\s*\{\s*\\?%\s*\}"), r"\\%"),
    (re.compile(r"^\{-\}"), "-"),
    # The imaginary unit behind its factor.
    (re.compile(r"\\(?:mathrm|text|mathbf)\s*\{\s*i\s*\}"), " i"),
    (re.compile(r"(?<=[0-9}])(?:\s|\\[ ,;:!]|\\cdot(?![A-Za-z])|\*)+i(?![A-Za-z])"), "i"),
]
# Most answers have none of these.
_RARE = re.compile(
    r"\\(?:[bB]ig|m(?:iddle|left|right)|displaystyle|textstyle|[lr]brace|[lr]angle|varnothing|degree|q?quad"
    r"|(?:text|math(?:rm|bf))\s*\{\s*[i\\%])|[ ;,:!*t]i(?![A-Za-z])|^\{-"
)
_ROUGHLY = re.compile(
    r"(?:(?:\\(?:approx|simeq|sim|cong)(?![A-Za-z])|~=|(?:\\text\s*\{\s*)?(?:approximately|approx\.?"
    r"|about|roughly|around)\s*\}?)\s*)(?=[-+0-9.$\\(])"
)
_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])\s*")
_MAX_SIGNS = 3
_BRACKETS = re.compile(r"\\.|[][(){},]", re.DOTALL)
_MIXED = re.compile(
    r"(?P<sign>-?)(?P<whole>[0-9]{1,15})(?: (?P<top>[0-9]{1,15})/(?P<bottom>[0-9]{1,15})"
    r"|\s*\\[dt]?frac\{(?P<over>[0-9]{1,15})\}\{(?P<under>[0-9]{1,15})\})(?P<percent>\s*\\?%)?"
)

_GROUPED = re.compile(r"-?[1-9][0-9]{0,2}(?:(?:[ ~]|\\[ ,;:!]|,\\!)\s*[0-9]{3})+(?:\.[0-9]+)?")
_SEPARATOR = re.compile(r"[^0-9.-]+")
_SCIENTIFIC = re.compile(r"(-?[0-9]{1,30}(?:\.[0-9]{1,30})?)[eE]([+-]?[0-9]{1,4})")

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
    text = _plain(text)
    if "\\boxed" in text or "\\fbox" in text:
        return None
    if _SUBSCRIPTED.search(text) and not _BASE.fullmatch(text):
        return None
    text = _REPEATING.sub(_as_fraction, text)
    value = split_unit(text)[0].removeprefix("+")
    if r"\text" in value or r"\math" in value or r"\mbox" in value:
        value = ", ".join(split_unit(part.strip())[0] for part in _parts(value))
        value = without_inner_units(value)
    if _GROUPED.fullmatch(value):
        return _SEPARATOR.sub("", value)
    if match := _MIXED.fullmatch(value):
        top, bottom = int(match["top"] or match["over"]), int(match["bottom"] or match["under"])
        top += int(match["whole"]) * bottom
        return rf"{match['sign']}\frac{{{top}}}{{{bottom}}}{match['percent'] or ''}"
    if match := _SCIENTIFIC.fullmatch(value):
        return rf"{match[1]} \cdot 10^{{{match[2]}}}"
    return _both_signs(value) if _SIGNS.search(value) else value


@lru_cache(maxsize=1024)
def _plain(text: str) -> str:
    """Without outer delimiters, in one spelling of signs, without sizes and "approximately"."""
    text = _unwrapped(text)
    if not text.isascii():
        text = text.translate(_TO_LATEX)
    if _RARE.search(text):
        text = _SIZED.sub("", text)
        for synonym, usual in _SYNONYMS:
            text = synonym.sub(usual, text)
        text = text.strip()
    if match := _ROUGHLY.match(text):
        text = text[match.end() :]
    return text


def _both_signs(text: str) -> str:
    """Each part with `\\pm` as two parts; the signs of `\\mp` are opposite."""
    braces = ("\\{", "\\}") if text.startswith("\\{") and text.endswith("\\}") else ("", "")
    inner = text[len(braces[0]) : len(text) - len(braces[1])]
    parts: list[str] = []
    for part in _parts(inner):
        signs = _SIGNS.findall(part)
        if not signs or len(signs) > _MAX_SIGNS:
            parts.append(part)
            continue
        together = "mp" in signs
        for drawn in product("+-", repeat=1 if together else len(signs)):
            each = iter(drawn * len(signs) if together else drawn)
            parts.append(_SIGNS.sub(lambda m: _sign(next(each), m[1]), part))  # noqa: B023
    return braces[0] + ", ".join(part.strip().removeprefix("+") for part in parts) + braces[1]


def _sign(drawn: str, command: str) -> str:
    return drawn if command == "pm" else {"+": "-", "-": "+"}[drawn]


def _parts(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif match[0] == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def conflict(gold: str, answer: str) -> bool:
    """Whether the notations alone prove that the answer is not the gold's.

    Bases, known units, a set against a tuple, clock times, dots on one side only, an operation
    that the answer leaves undone and the gold does not have.
    """
    gold, answer = _plain(gold), _plain(answer)
    return (
        _differ(_base(gold), _base(answer))
        or _differ(unit_of(gold), unit_of(answer))
        or {_bracket(gold), _bracket(answer)} == {"{", "("}
        or _differ(_clock(gold), _clock(answer))
        or bool(_DOTS.search(gold)) != bool(_DOTS.search(answer))
        or _undone(gold, _last_side(answer))
    )


def approximation(answer: str) -> str | None:
    """The number behind the approximation sign, as 12.57 in `4\\pi \\approx 12.57`."""
    before, sign, number = _plain(answer).rpartition(r"\approx")
    number = split_unit(number.strip())[0]
    return number if before.strip() and sign and _PLAIN_DECIMAL.fullmatch(number) else None


def _unwrapped(text: str) -> str:
    """Without dollar signs or a box around all of it, and without a full stop."""
    text = text.strip()
    for _ in range(4):  # nobody nests deeper than a box in dollars in a box
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
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


def _differ(first: object, second: object) -> bool:
    return first is not None and second is not None and first != second


def _base(text: str) -> str | None:
    match = _BASE.fullmatch(text)
    return (match[1] or match[2]).lstrip("0") if match else None


def _bracket(text: str) -> str | None:
    """The bracket around all of a list with more than one member or of a set."""
    text = text.replace("\\left", "").replace("\\right", "").strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        members = _parts(text[2:-2])
        # `\{(1,2),(3,4)\}` is written without braces as well.
        return None if all("(" in member for member in members) else "{"
    if not text.startswith("(") or not text.endswith(")") or "," not in text:
        return None
    return "(" if len(_parts(text)) == 1 else None


def _clock(text: str) -> tuple[int, int] | None:
    match = _CLOCK.fullmatch(split_unit(text)[0])
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
