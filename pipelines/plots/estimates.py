"""Estimates of differences as text: units, signs, intervals. heat.py and differences.py show them.

Differences of pass rates are shares of one, as everywhere; they are shown as percentage points.
"""

import math
from collections.abc import Iterable
from typing import Literal

from ..statistics import Estimate

Unit = Literal["points", "tokens", "nats"]

_NAMES: dict[Unit, str] = {"points": "percentage points", "tokens": "tokens", "nats": "nats"}
_PLACES: dict[Unit, int] = {"points": 1, "tokens": 1, "nats": 3}  # decimal places


def unit_name(unit: Unit) -> str:
    """A unit in words."""
    return _NAMES[unit]


def scaled(value: float, unit: Unit) -> float:
    """A value in its unit: a share of one as percentage points."""
    return 100 * value if unit == "points" else value


def signed(value: float, unit: Unit) -> str:
    """A difference with its sign, which a value that is rounded to 0 keeps: on which side of 0 an
    interval ends is what counts."""
    return f"{scaled(value, unit):+.{_PLACES[unit]}f}".replace("-", "−")


def interval(estimate: Estimate, unit: Unit) -> str:
    """Both ends with their signs; "" without an interval."""
    if not math.isfinite(estimate.low + estimate.high):
        return ""
    return f"{signed(estimate.low, unit)} to {signed(estimate.high, unit)}"


def measured(estimate: Estimate | None) -> Estimate | None:
    """An estimate; None where it has no value."""
    return None if estimate is None or math.isnan(estimate.value) else estimate


def resolved(estimate: Estimate) -> bool:
    """Whether the interval excludes 0; without an interval this is not known, so False."""
    return estimate.low > 0 or estimate.high < 0


def bound(estimates: Iterable[Estimate | None], unit: Unit) -> float:
    """The largest absolute value of these, in the unit; 1 if there is none."""
    sizes = [abs(scaled(one.value, unit)) for one in map(measured, estimates) if one is not None]
    return max(sizes, default=0.0) or 1.0
