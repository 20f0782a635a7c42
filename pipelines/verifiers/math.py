"""math-verify's reading and comparison of two answers, faster and without its wrong equalities.

Called by a verification worker alone: a comparison can take any time and memory. Except for
percentages and inequalities, what math-verify calls different stays different. Three things are
added. The grammar is parsed in two stages, as ANTLR advises, which gives the same trees up to
thirty times faster. Before algebra decides "equal", values must agree: both sides are evaluated, at
a point if they have variables, which also decides most unequal pairs without `simplify`. And the
last side of an equation answers only if the first names or equals it.
"""

import logging
import re
from functools import lru_cache
from typing import Any

import sympy
from antlr4 import PredictionMode
from latex2sympy2_extended.latex2sympy2 import (
    NormalizationConfig,
    _Latex2Sympy,
    convert_to_pct,
    normalize_latex,
)
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from math_verify import grader, verify
from math_verify.parser import get_last_eq
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from .notation import plain_number, prepare

# It warns once that its timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Boxes are unwrapped and units split off by `prepare`; math-verify takes `2d` for two days.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
_INTEGER = re.compile(r"[0-9]{1,300}")
_DECIMAL = re.compile(r"[0-9]{1,150}\.[0-9]{1,150}")
_FRACTION = re.compile(r"(-?)\\frac\{([0-9]{1,150})\}\{([0-9]{1,150})\}")
# Not e, which has its own rule, nor d of a differential, nor the inverse of a function.
_POWER = re.compile(
    r"(?<![A-Za-z\\])(?P<symbol>[a-cf-zA-CF-Z]|\\pi(?![A-Za-z]))\^"
    r"(?=(?:\{[^{}]*\}|[0-9]+|[a-z])(?!\s*(?:\(|\\left|_)))"
)
# Degrees count as a number, except in the argument of a function.
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
# A name that the grammar can't read, as in m_{\max} = 5.
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|text|mathrm|overline|max|min|operatorname|vec|left|right)(?![A-Za-z])"
    r"|\\[ ,;]|[A-Za-z_{}()|:'\s.])+"
)
# Their values take quadrature or a summation term by term.
_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
# Relative: exact values carry 15 digits, decimals are given to a few.
_EXACT, _ROUNDED, _APPROXIMATE = 1e-9, 1e-3, 0.05
_PLACES = 2e-6  # absolute
# A sum below this counts as zero: after cancellation no digit is right.
_ZERO = sympy.Float("1e-100")


class _Reader(_Latex2Sympy):
    """latex2sympy's converter, except that `2(3)` and `2 3` are not read as 2 + 3."""

    def convert_postfix_list(self, arr: list[Any], i: int = 0) -> Any:
        if i + 1 < len(arr) and _is_integer(arr[i]):
            following = arr[i + 1].start.text
            if following[0].isdigit():
                raise ValueError("two numbers side by side")
            if not following.endswith("frac"):
                first = super().convert_postfix_list([arr[i]])
                rest = self.convert_postfix_list(arr, i + 1)
                if getattr(rest, "is_Matrix", False):
                    return self.mat_mul_flat(first, rest)
                return self.mul_flat(first, rest)
        return super().convert_postfix_list(arr, i)

    def convert_relation(self, rel: Any) -> Any:
        value = super().convert_relation(rel)
        if not rel.expr() and rel.APPROX() and rel.relation(1).expr():
            # The converter takes one of the two; both must be the same number.
            other = self.convert_expr(rel.relation(1).expr())
            side = grader.take_last_relation(value)
            side = side.rhs if isinstance(side, Relational) else side
            if _apart(side, other, tolerance=_APPROXIMATE):
                raise ValueError("two numbers that differ around an approximation sign")
        return value

    def parse_number(self, text: str) -> Any:
        """Without sympy's evaluation of the text as Python, which takes a thousand times longer."""
        text = text.replace(",", "")
        if _INTEGER.fullmatch(text):
            return sympy.Integer(int(text))
        return sympy.Float(text) if _DECIMAL.fullmatch(text) else super().parse_number(text)


class _FirstStage(_Reader):
    """Predicts without full context: the same trees as the second stage, faster.

    Without context the grammar cannot tell a power from a symbol with an upper index; braces do.
    """

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(_POWER.sub(r"{\g<symbol>}^", latex_str))
        parser._interp.predictionMode = PredictionMode.SLL
        return parser


def _is_integer(node: Any) -> bool:
    """A node of the parse tree that is a number without a point, perhaps in brackets."""
    if node.stop.tokenIndex - node.start.tokenIndex > 3:
        return False
    return node.getText().strip("(){}-").isdigit()


@lru_cache(maxsize=512)  # the answers of a group share their gold
def read(text: str) -> Any:
    """The sympy object of an answer, unevaluated; None if any part of it can't be read.

    Raises:
        MemoryError: reading took too much.
    """
    prepared = prepare(text)
    if prepared is None:
        return None
    latex = normalize_latex(prepared, _NORMALIZATION)
    if _INTEGER.fullmatch(latex):
        return sympy.Integer(int(latex))
    if _DECIMAL.fullmatch(latex):
        return sympy.Float(latex)
    if match := _FRACTION.fullmatch(latex):
        return sympy.Rational(int(match[1] + match[2]), int(match[3]))
    if latex.endswith("%") and (share := latex.rstrip("%\\ ")).endswith("}"):
        number = _parse(share)  # the grammar knows shares of decimals only
        return None if number is None else convert_to_pct(number)
    value = _parse(latex)
    if value is None and (last := get_last_eq(latex)) != latex and not _contradicts(latex):
        value = _parse(last)
    if value is None and latex.count("=") == 1:
        name, _, last = latex.partition("=")
        is_name = _NAME.fullmatch(name) and name.count("{") == name.count("}")
        value = _parse(last) if is_name else None
    return value


def _contradicts(chain: str) -> bool:
    """Whether a chain `a = b = c` that can't be read has two plain numbers that differ."""
    numbers = {plain_number(side.strip()) for side in chain.split("=")} - {None}
    return len(numbers) > 1


def _parse(latex: str) -> Any:
    is_real = not (_IMAGINARY.search(latex) or grader.should_treat_as_complex(latex))
    in_degrees = bool(_ANGLE_FUNCTION.search(latex))
    for reader in (_FirstStage, _Reader):
        try:
            return reader(is_real=is_real, convert_degrees=in_degrees).parse(latex)
        except MemoryError:
            raise
        except Exception:  # noqa: S112 - errors on text that is no formula have many types
            continue
    return None


def equal(gold: Any, answer: Any) -> bool:
    """Whether an answer that was read equals the gold, in this order.

    Raises:
        Exception: whatever sympy raises on odd expressions.
    """
    if not _sides_agree(answer) or _swapped(gold, answer):
        return False
    if (share := grader.get_pct_val(answer)) is not None:
        # A percentage is right for its number and for a hundredth of it.
        number = grader.get_pct_val(gold, gold)
        return equal(number, share) or (number is gold and equal(gold, share / 100))
    if (share := grader.get_pct_val(gold)) is not None:
        return equal(share, answer) or equal(share / 100, answer)
    gold, answer = _alone(gold), _alone(answer)
    if grader.is_relation(answer) and not grader.is_equation(answer):
        gold, answer = _as_sets(gold, answer)
    # The order matters: gold `1<x<2` accepts `(1,2)`, not the reverse. Timeouts are off: they use
    # SIGALRM, which works in main threads only and cancels an outer alarm.
    try:
        return verify(gold, answer, timeout_seconds=0, raise_on_error=True)
    except ValueError as error:
        # Chains of inequalities or systems of equations of different length.
        if str(error).startswith("zip()"):
            return False
        raise


def rounds(value: Any, decimal: str) -> bool:
    """Whether a decimal is a value to its last place, or cut there."""
    if grader.is_equation(value):
        value = grader.take_last_relation(value).rhs
    if not isinstance(value, sympy.Expr) or not value.is_number:
        return False
    place = sympy.Rational(1, 10 ** len(decimal.partition(".")[2]))
    difference = abs(value - sympy.Rational(decimal)).evalf(15)
    return bool(difference.is_Number and difference < place)


def _sides_agree(answer: Any) -> bool:
    """Whether the numbers in a chain `a = b = c` agree: math-verify compares the last alone."""
    relations = _in_order(answer) if isinstance(answer, And) else [answer]
    sides = [
        side
        for relation in relations
        if isinstance(relation, sympy.Eq)
        for side in (relation.lhs, relation.rhs)
        if isinstance(side, sympy.Expr) and side.is_number
    ]
    return not any(_apart(sides[-1], side) for side in sides[:-1])


def _alone(value: Any) -> Any:
    """The one point of a set of points: braces around it are optional."""
    if isinstance(value, FiniteSet) and len(value.args) == 1:
        point = value.args[0]
        return point if isinstance(point, sympy.Tuple | sympy.Interval) else value
    return value


def _as_sets(gold: Any, answer: Any) -> tuple[Any, Any]:
    """The set of an inequality's solutions, where the gold is a set and no point as `(1,2)`."""
    members = gold.rhs if isinstance(gold, sympy.Eq) else gold  # x in [-2,7] is read as x = [-2,7]
    if not isinstance(members, sympy.Interval | sympy.Union) or len(answer.free_symbols) != 1:
        return gold, answer
    is_point = members.is_open and members is gold and members.measure.is_finite
    return (gold, answer) if is_point else (members, answer.as_set())


def _in_order(several: Any) -> list[Any]:
    """The members as written: sympy sorts them."""
    return several._unsorted_args


def _swapped(gold: Any, answer: Any) -> bool:
    """Whether values for `x=1, y=2` are in another order: math-verify sorts them."""
    if not isinstance(gold, FiniteSet) or len(gold.args) < 2:
        return False
    given = _in_order(gold)
    if not all(isinstance(one, sympy.Eq) for one in given) or len({one.lhs for one in given}) < 2:
        return False
    if isinstance(answer, sympy.Tuple):
        values = answer.args
    elif isinstance(answer, FiniteSet):
        values = _in_order(answer)
    else:
        return False
    if len(values) != len(given) or any(isinstance(value, sympy.Eq) for value in values):
        return False
    return not all(
        grader.sympy_expr_eq(one.rhs, value, 6, 15)
        for one, value in zip(given, values, strict=True)
    )


# --- numbers before algebra ----------------------------------------------------------------------


def _apart(gold: Any, answer: Any, tolerance: float | None = None) -> bool:
    """Whether evaluation proves two expressions different; False where it proves nothing.

    tolerance: relative to the gold; by default what their digits allow.
    """
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return False
    return _values_differ(gold, answer, tolerance)


@lru_cache(maxsize=256)  # both of math-verify's comparisons ask
def _values_differ(gold: sympy.Expr, answer: sympy.Expr, tolerance: float | None) -> bool:
    if any(one.has(sympy.UnevaluatedExpr, *_UNFINISHED) for one in (gold, answer)):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    points: dict[Any, Any] = {
        symbol: sympy.Rational(355, 113 - 7 * i) for i, symbol in enumerate(symbols[:8])
    }
    if len(symbols) > len(points):
        return False
    first, second = (one.evalf(15, subs=points or None) for one in (gold, answer))
    if not (first.is_Number and second.is_Number and first.is_finite and second.is_finite):
        return False
    size, difference = abs(first), abs(first - second)
    if max(size, abs(second)) < _ZERO:
        return False
    if tolerance is not None:
        return bool(difference > tolerance * size)
    if not any(one.has(sympy.Float) for one in (gold, answer)):
        return bool(difference > _EXACT * size)
    # Decimals count to their sixth place, which proves little about a small number.
    places = _ROUNDED * size if symbols else max(_PLACES, _EXACT * size)
    return bool(difference > min(places, _ROUNDED * size))


def _only_if_close(compare: Any) -> Any:
    def guarded(gold: Any, answer: Any, *limits: int) -> bool:
        return not _apart(gold, answer) and compare(gold, answer, *limits)

    return guarded


def _only_if_answered(compare: Any) -> Any:
    """`x+1=5` is no 5, and `x^2-4=0` no 0, although their last sides are."""

    def guarded(gold: Any, answer: Any, *limits: Any, **options: Any) -> bool:
        if grader.is_equation(answer) and not grader.is_equation(gold):
            first, last = grader.take_first_relation(answer), grader.take_last_relation(answer)
            if last.rhs.is_Symbol and isinstance(first.lhs, sympy.Expr) and first.lhs.is_number:
                answer = sympy.Eq(last.rhs, first.lhs, evaluate=False)
            elif not _answers(first.lhs, last.rhs):
                return False
        return compare(gold, answer, *limits, **options)

    return guarded


def _answers(left: Any, value: Any) -> bool:
    """Whether `left = value` states what a quantity is, and is no equation to solve.

    The left side is a name, as x, f(0), |AB| or (x,y); or it equals the value; or it combines
    several unknowns, which no single number solves, as m+n = 113, unless that is zero.
    """
    if not isinstance(left, sympy.Expr) or not isinstance(value, sympy.Expr):
        return True
    if left.is_Symbol or isinstance(left, AppliedUndef | sympy.Derivative):
        return True
    if left.free_symbols and value.is_number and not value.is_zero:
        named = left.args[0] if isinstance(left, sympy.Abs | TrigonometricFunction) else left
        several = len(named.free_symbols | named.atoms(AppliedUndef)) > 1
        return named.is_Symbol or (several and _combines_names(named))
    return not _apart(left, value) and not (left.free_symbols and value.is_zero)


def _combines_names(expression: Any) -> bool:
    """Without numbers, except for signs and powers."""
    if isinstance(expression, sympy.Pow):
        return _combines_names(expression.base) and expression.exp.is_number
    if isinstance(expression, sympy.Mul):
        return all(one in (1, -1) or _combines_names(one) for one in expression.args)
    if isinstance(expression, sympy.Add | sympy.Abs):
        return all(_combines_names(one) for one in expression.args)
    return bool(expression.is_Symbol or isinstance(expression, AppliedUndef))


def _expanded_first(compare: Any) -> Any:
    """Most equal pairs need no `simplify`."""

    def guarded(gold: Any, answer: Any) -> bool:
        both = isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)
        return (both and sympy.expand(gold - answer) == 0) or compare(gold, answer)

    return guarded


def _only_if_solvable(compare: Any) -> Any:
    """`x^2+1=0` and `1=2` have the same real solutions: none."""

    def guarded(gold: Relational, answer: Relational, *limits: int) -> bool:
        if isinstance(gold, sympy.Eq) and not sympy.solve(gold, gold.free_symbols):
            return False
        return compare(gold, answer, *limits)

    return guarded


# math-verify compares sets, tuples, intervals, matrices and relations element by element with
# these. 10^{-20} is no 10^{-30} and not 0, although both are cut to zero there.
grader.sympy_numeric_eq = _only_if_close(grader.sympy_numeric_eq)
grader.sympy_symbolic_eq = _only_if_close(_expanded_first(grader.sympy_symbolic_eq))
grader.sympy_expr_eq = _only_if_answered(grader.sympy_expr_eq)
grader.sympy_solve_and_compare = _only_if_solvable(grader.sympy_solve_and_compare)
