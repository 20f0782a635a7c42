"""Units behind an answer's value. Called by notation.py.

A unit is split off after any expression where it is marked as text, and after a number where it is
not; only known units can contradict each other. Text only, linear in the answer's length.
"""

import re
from functools import lru_cache

_SPACE = r"(?:\s|~|\\[ ,;:!])*"
_MARK = (
    r"\\(?:text(?:rm|bf|it|sf|tt|up|md|normal)?|math(?:rm|bf|it|sf|up|normal)|[mh]box"
    r"|operatorname)"
)
_POWER = r"(?:\^\s*(?:\{\s*(-?[0-9])\s*\}|([0-9])))?"
# Inside a mark: words and their powers, as in \text{ cm$^3$} and \mathrm{m\,s^{-2}}.
_INSIDE = r"(?:[^{}0-9\\^]|\\[ ,;:!]|\\cdot|\^\s*\$?\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))*"
_MARKED = re.compile(
    rf"{_SPACE}(?P<over>/|\\cdot|\\times)?{_SPACE}(?:{_MARK}\s*\{{({_INSIDE})\}}"
    rf"|\{{\\rm\s+({_INSIDE})\}}){_SPACE}{_POWER}{_SPACE}$"
)
_FRACTION = re.compile(
    rf"{_SPACE}\\[dt]?frac\s*\{{\s*{_MARK}\s*\{{({_INSIDE})\}}\s*\}}"
    rf"\s*\{{\s*{_MARK}\s*\{{({_INSIDE})\}}\s*{_POWER}\s*\}}{_SPACE}$"
)
_BARE = re.compile(
    rf"(?P<space>{_SPACE})(?<![A-Za-z\\])(?P<unit>[A-Za-z][A-Za-z./ -]*?){_SPACE}{_POWER}{_SPACE}$"
)
_TEMPERATURE = re.compile(
    rf"{_SPACE}\^\s*\{{?\s*\\circ\s*\}}?{_SPACE}(?:{_MARK}\s*\{{\s*([CF])\s*\}}|([CF]))\s*$"
)
_CURRENCY = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}
_CURRENCY_WORD = re.compile(r"(?:\\text\{\s*)?(Rs|USD|EUR|US\\\$)\.?\s*\}?\s*(?=[0-9])")
_INNER = re.compile(
    rf"(?:(?<=[0-9}}])|(?<=\\pi)){_SPACE}{_MARK}\s*\{{({_INSIDE})\}}{_SPACE}{_POWER}"
    r"(?=\s*(?:[,)\]=]|\\approx))"
)
_TAIL = 120

_VALUE_END = re.compile(r"(?:[0-9})\]%.]|\\pi|\\circ)$")
_VARIABLE_END = re.compile(r"[A-Za-z]$")
# What may precede a unit that is not marked as text: a number, not a product of variables.
_NUMERIC = re.compile(
    r"(?:[-+0-9.,:/(){}^ ]|\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right|[ ,;:!]))+$"
)
_NO_UNIT = {
    "or", "and", "not", "no", "isn't", "is", "are", "to", "but", "maybe", "rather", "wrong", "if",
    "approximately", "about", "perhaps", "possibly", "otherwise", "when", "for", "where", "with",
}  # fmt: skip

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre",
    "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gm", "kg": "kilogram", "lb": "",
    "s": "sec second", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "",
    "year": "yr", "ml": "milliliter millilitre", "l": "liter litre", "dollar": "usd",
    "cent": "", "degree": "deg", "rad": "radian", "unit": "", "am": "a.m", "pm": "p.m",
    "n": "newton", "j": "joule", "w": "watt", "v": "volt", "hz": "hertz",
    "euro": "eur", "yen": "", "rupee": "rs", "yuan": "",
}  # fmt: skip
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in [unit, *names.split()]}
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_SHORT_WORDS = {"per", "sq", "of", "cu", "the", "a", "an", "men"}
_POWER_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER_BEHIND = {"squared": 2, "cubed": 3}
_TOKEN = re.compile(r"[A-Za-z][A-Za-z.]*|/|\^\s*\{?\s*-?[0-9]")

Unit = frozenset[tuple[str, int]]


def split_unit(text: str) -> tuple[str, str | None]:
    """The value and its unit in words, as "m/s^2"; None as the unit if there is none."""
    for sign in _CURRENCY:
        if text.startswith(sign):
            return text.removeprefix(sign).strip(), _CURRENCY[sign]
        if text.endswith(sign):
            return text.removesuffix(sign).strip(), _CURRENCY[sign]
    if match := _CURRENCY_WORD.match(text):
        return text[match.end() :], match[1].lower()
    if text.endswith((")", "]")) or (text[-1:].isdigit() and "^" not in text[-_TAIL:]):
        return text, None
    if match := _TEMPERATURE.search(text[-_TAIL:]):
        return _before(text, match), "celsius" if "C" in match.groups() else "fahrenheit"
    value, words = _split_marked(text)
    return (value, words) if words is not None else _split_bare(text)


def without_inner_units(text: str) -> str:
    """A list or tuple without the known units of its members."""
    return _INNER.sub(lambda match: match[0] if _canonical(match[1]) is None else "", text)


def _before(text: str, match: re.Match) -> str:
    return text[: len(text) - len(text[-_TAIL:]) + match.start()].strip()


def _split_marked(text: str) -> tuple[str, str | None]:
    """Without the text commands at the end, as in `\\mathrm{~m} / \\mathrm{s}^{2}`."""
    if match := _FRACTION.search(text[-_TAIL:]):
        top, bottom = _words(match[1]), _words(match[2])
        words = f"{top}/{bottom}^{match[3] or match[4] or 1}"
        return (_before(text, match), words) if _canonical(words) else (text, None)
    value, words = text, ""
    while match := _MARKED.search(value[-_TAIL:]):
        part = _words(match[2] if match[2] is not None else match[3])
        power = match[4] or match[5]
        joint = "/" if match["over"] == "/" else " "
        words = f"{joint}{part}{'^' + power if power else ''}{words}"
        value = _before(value, match)
    words = words.strip()
    if not words.strip("/ ") or not _reads_as_unit(words):
        return text, None
    if _VALUE_END.search(value):
        return value, words
    # A property, as in `n \text{ odd}`, belongs to its variable.
    is_known = _canonical(words) is not None or words.rpartition(" ")[2] in {"unit", "units"}
    return (value, words) if _VARIABLE_END.search(value) and is_known else (text, None)


def _words(inside: str) -> str:
    return re.sub(r"\\[ ,;:!]|\\cdot|[~$]", " ", inside).strip()


def _split_bare(text: str) -> tuple[str, str | None]:
    match = _BARE.search(text[-_TAIL:])
    if match is None:
        return text, None
    value, words = _before(text, match), match["unit"].strip()
    if not _VALUE_END.search(value) or not _reads_as_unit(words):
        return text, None
    if not _NUMERIC.fullmatch(value) or not _is_bare_unit(words, spaced=bool(match["space"])):
        return text, None
    power = match[3] or match[4]
    return value, f"{words}^{power}" if power else words


def _reads_as_unit(words: str) -> bool:
    """False for "or seven" and the like: an answer must not name a second one."""
    named = words.lower().replace("-", " ").split()
    return len(named) <= 6 and not _NO_UNIT & set(named)


def _is_bare_unit(words: str, spaced: bool) -> bool:
    """A word that cannot be a product of variables, or a known unit; one letter needs a space."""
    named = words.lower().replace("/", " ").split()
    if not spaced:
        return len(named) == 1 and len(named[0]) > 1 and _known(named[0]) is not None
    words_only = any(len(w) > 3 for w in named) and all(len(w) > 1 for w in named)
    return words_only or all(len(w) > 3 or w in _SHORT_WORDS or _known(w) for w in named)


def _known(word: str) -> str | None:
    word = word.strip(".")
    return _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s")) or _COMPOUND.get(word)


@lru_cache(maxsize=1024)
def unit_of(text: str) -> Unit | None:
    """The known unit of an answer, its names with their powers; None if any part is unknown."""
    words = split_unit(text)[1]
    if words in ("celsius", "fahrenheit"):
        return frozenset({(words, 1)})
    return _canonical(words) if words is not None else None


def _canonical(words: str) -> Unit | None:
    powers: dict[str, int] = {}
    sign, power, last = 1, 1, ""
    for token in _TOKEN.findall(words):
        word = token.lower().strip(".")
        if token == "/" or word == "per":  # noqa: S105 - a unit's token, no password
            sign = -1
        elif token[0] == "^":
            powers[last] = powers.get(last, 0) * int(token.strip("^ {"))
        elif word in _POWER_BEFORE:
            power = _POWER_BEFORE[word]
        elif word in _POWER_BEHIND:
            powers[last] = powers.get(last, 0) * _POWER_BEHIND[word]
        elif (unit := _known(word)) and unit != "unit":
            for index, last in enumerate(unit.split("/")):
                powers[last] = powers.get(last, 0) + sign * power * (-1 if index else 1)
            power = 1
        else:
            return None
    return frozenset(powers.items()) if powers and "" not in powers else None
