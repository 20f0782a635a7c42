"""A probe's figures with intervals, by name: `figures`, which probe.py calls.

The unit of resampling is the problem.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ...schemas.labels import Route, TypeLabel
from ..statistics import Estimate, bootstrap_sums
from .measure import Samples, has_signal, per_row, sums

_RESAMPLES = 2000
_SPANS = (Route.FKL, Route.RKL)
_PLACES = {
    "key": (Route.FKL,),
    "error": (Route.RKL,),
    "spans": _SPANS,
    "elsewhere": (Route.GRPO,),
}


def figures(
    ids: Sequence[str],
    student: Samples,
    rows: Mapping[str, Sequence[tuple[str, TypeLabel]]],
    teachers: Mapping[TypeLabel, Samples],
    place: np.ndarray,
    tokens: Sequence[int],
    kl: Mapping[str, np.ndarray],
) -> dict[str, Estimate]:
    """Estimates by name; NaN where nothing is measured.

    ids: of the problems. rows: by labelling, right_label and wrong_label, each labelled response's
    problem and label. place: (tokens,) the route that a span gives a token; tokens: of each
    labelled response; kl: (tokens,) by labelling, nats.

    pass_rate, tokens: means over the student's responses; signal: share of the problems with right
    and wrong ones. Of each labelling: pass_rate and tokens of the teacher, means over problems of
    their mean over the problem's labels; key, error, spans, elsewhere: mean KL(teacher ‖ student)
    over the tokens there. right_label_gain: the teacher's pass rate less the student's on the same
    problems; right_label_length: the quotient of their tokens; spans_right_to_wrong: of KL on spans
    under the right and a wrong label; elsewhere_to_spans: of KL elsewhere and on spans under the
    right one.
    """
    right = sums(ids, student.problem, student.right)
    length = sums(ids, student.problem, student.tokens)
    signal = has_signal(ids, student)
    found = {
        "pass_rate": _quotient(right),
        "signal": _mean(signal),
        "tokens": _quotient(length),
    }
    divergence: dict[str, np.ndarray] = {}
    taught: dict[str, np.ndarray] = {}
    problem = np.repeat(np.array([one for one, _ in rows["right_label"]], dtype=object), tokens)
    for name, labelled in rows.items():
        own = np.array([one for one, _ in labelled], dtype=object)
        for what, values in (("pass_rate", _right), ("tokens", _tokens)):
            mean = _means(sums(ids, own, per_row(labelled, teachers, values)))
            taught[f"{name}_{what}"] = mean
            found[f"{name}_{what}"] = _mean(mean)
        for where, routes in _PLACES.items():
            chosen = np.isin(place, [int(route) for route in routes])
            divergence[f"{name}_{where}"] = sums(ids, problem[chosen], kl[name][chosen])
            found[f"{name}_{where}"] = _quotient(divergence[f"{name}_{where}"])
    found["right_label_gain"] = _mean(taught["right_label_pass_rate"] - _means(right))
    both = np.stack([taught["right_label_tokens"], _means(length)], axis=1)
    found["right_label_length"] = _quotient(both[~np.isnan(both).any(axis=1)])
    spans = divergence["right_label_spans"]
    paired = np.stack([spans[:, 0], divergence["wrong_label_spans"][:, 0]], axis=1)
    found["spans_right_to_wrong"] = _quotient(paired)
    four = np.concatenate([divergence["right_label_elsewhere"], spans], axis=1)
    found["elsewhere_to_spans"] = bootstrap_sums(
        four, lambda s: (s[..., 0] * s[..., 3]) / (s[..., 1] * s[..., 2]), _RESAMPLES
    )
    return found


def _right(samples: Samples) -> np.ndarray:
    return samples.right


def _tokens(samples: Samples) -> np.ndarray:
    return samples.tokens


def _means(values: np.ndarray) -> np.ndarray:
    """(problems,) of (problems, 2) sums and numbers; NaN without values."""
    out = np.full(len(values), np.nan)
    return np.divide(values[:, 0], values[:, 1], out=out, where=values[:, 1] > 0)


def _mean(values: np.ndarray) -> Estimate:
    """The mean over problems; those with NaN do not count."""
    defined = values[~np.isnan(values)]
    return _quotient(np.stack([defined, np.ones_like(defined)], axis=1))


def _quotient(values: np.ndarray) -> Estimate:
    """Σ first / Σ second of (problems, 2)."""
    return bootstrap_sums(values, lambda s: s[..., 0] / s[..., 1], _RESAMPLES)
