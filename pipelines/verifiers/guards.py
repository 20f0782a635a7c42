"""Guards around math-verify's comparisons: values before algebra, equations that answer.

Importing the module puts them in place, so that sets, tuples, intervals, matrices and relations,
which math-verify compares element by element, have them too. Called by math.py.
"""

from functools import lru_cache
from typing import Any

import sympy
from math_verify import grader
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.functions.elementary.trigonometric import TrigonometricFunction

# Their values take quadrature or a summation term by term.
_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
# Relative: exact values carry 15 digits, decimals are given to a few.
_EXACT, _ROUNDED = 1e-9, 1e-3
_PLACES = 2e-6  # absolute
# A sum below this counts as zero: after cancellation no digit is right.
_ZERO = sympy.Float("1e-100")


def apart(gold: Any, answer: Any, tolerance: float | None = None) -> bool:
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
        return not apart(gold, answer) and compare(gold, answer, *limits)

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
    if left in value.free_symbols:
        return False
    if left.is_Symbol or isinstance(left, AppliedUndef | sympy.Derivative):
        return True
    if left.free_symbols and value.is_number and not value.is_zero:
        named = left.args[0] if isinstance(left, sympy.Abs | TrigonometricFunction) else left
        several = len(named.free_symbols | named.atoms(AppliedUndef)) > 1
        return named.is_Symbol or (several and _combines_names(named))
    return not apart(left, value) and not (left.free_symbols and value.is_zero)


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
