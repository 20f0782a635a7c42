"""How far two annotators agree, and how far one is right: from counts to figures and intervals.

Counts are summed over rollouts before a figure is taken, per problem and over all problems, so a
long response weighs more than a short one. What is undefined (a share of nothing, κ where no
disagreement could have been) is NaN, null in tables. Definitions stand with their functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...schemas.labels import AnnotationStatus
from .marks import NO_ERROR, STATUSES, TYPES, UNKNOWN, Marks, Units, row_sums

# Of a rollout's two annotations.
SHARED = (
    "judged", "only_reference", "only_other", "neither", "asked_differently", "both_empty", "units",
    "reference_marked", "other_marked", "both_marked", "reference_kept", "other_kept", "both_kept",
    "same_segments", "reference_segments", "other_segments", "both_segments", "typed", "same_type",
    "wrong", "wrong_hit", "right", "right_hit", "unlabelled",
)  # fmt: skip
# Of each annotation alone.
OWN = (
    *(status.value for status in AnnotationStatus),
    "units", "marked", "kept", "cap_hits", "prompt_tokens", "completion_tokens", "cost_usd",
)  # fmt: skip
COUNTS = (*SHARED, *(f"{side}.{name}" for side in ("reference", "other") for name in OWN))

FIGURES = (
    "kappa", "iou", "capped_kappa", "capped_iou", "segment_precision", "segment_recall",
    "segment_f1", "type_agreement", "wrong_accuracy", "right_accuracy", "first_error_f1",
)  # fmt: skip

Counts = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Side:
    """One annotator's marks of a chunk of rollouts.

    marked, kept: (units,) bool, what they cover before and after the cap; bills: (rows,) floats of
    prompt_tokens, completion_tokens, cost_usd, NaN where unknown.
    """

    marks: Marks
    units: Units
    marked: np.ndarray
    kept: np.ndarray
    bills: Counts


def shared_counts(reference: Side, other: Side) -> dict[str, np.ndarray]:
    """SHARED of each rollout, (rows,) each.

    Agreement is counted over rollouts that both annotators answered (ok or empty) and searched for
    the same kind of span: `judged`. The others are counted by what is missing.
    """
    offsets = reference.units.offsets
    first, second = reference.marks, other.marks
    both = first.answered & second.answered
    judged = both & (first.kind == second.kind)

    def of_judged(values: np.ndarray) -> np.ndarray:
        return np.where(judged, row_sums(values, offsets), 0)

    same, segments = _segment_counts(first, second, judged)
    counts = {
        "judged": judged,
        "only_reference": first.answered & ~second.answered,
        "only_other": second.answered & ~first.answered,
        "neither": ~first.answered & ~second.answered,
        "asked_differently": both & ~judged,
        "units": np.where(judged, np.diff(offsets), 0),
        "reference_marked": of_judged(reference.marked),
        "other_marked": of_judged(other.marked),
        "both_marked": of_judged(reference.marked & other.marked),
        "reference_kept": of_judged(reference.kept),
        "other_kept": of_judged(other.kept),
        "both_kept": of_judged(reference.kept & other.kept),
        "same_segments": same,
        **segments,
    }
    typed = judged & (first.type >= 0) & (second.type >= 0)
    counts |= {
        "both_empty": judged & (counts["reference_marked"] + counts["other_marked"] == 0),
        "typed": typed,
        "same_type": typed & (first.type == second.type),
        **_first_error_counts(first, second),
    }
    return {name: counts[name] for name in SHARED}


def _segment_counts(
    first: Marks, second: Marks, judged: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Marked segments of the judged rollouts that both annotators saw cut in the same places."""
    if np.array_equal(first.segment_offsets, second.segment_offsets):
        differ = row_sums(first.segment_ends != second.segment_ends, first.segment_offsets) > 0
    else:
        cuts = (first.segments(row) != second.segments(row) for row in range(first.rows))
        differ = np.fromiter(cuts, dtype=bool, count=first.rows)
    same = judged & ~differ

    def of_same(marks: Marks, marked: np.ndarray) -> np.ndarray:
        return np.where(same, row_sums(marked, marks.segment_offsets), 0)

    # The second annotator's marks on the first one's segments, where they are the same ones.
    row = np.repeat(np.arange(first.rows), np.diff(first.segment_offsets))
    place = np.arange(len(row)) - first.segment_offsets[row] + second.segment_offsets[row]
    matched = same[row]
    aligned = np.zeros(len(row), dtype=bool)
    aligned[matched] = second.marked[place[matched]]
    return same, {
        "reference_segments": of_same(first, first.marked),
        "other_segments": of_same(second, second.marked),
        "both_segments": of_same(first, first.marked & aligned),
    }


def _first_error_counts(reference: Marks, other: Marks) -> dict[str, np.ndarray]:
    """Rollouts by the reference's first error, and whether the other annotator found it.

    Hit: the other's first marked character lies in the reference's first error span, so that with
    equal segments and one segment per step the first marked segment is the first wrong one. On a
    response without an error: it says that there is none. An annotator that says nothing misses.
    """
    truth, said = reference.first_error, other.first_error
    wrong, right = truth >= 0, truth == NO_ERROR
    return {
        "wrong": wrong,
        "wrong_hit": wrong & (said >= truth) & (said < reference.first_error_end),
        "right": right,
        "right_hit": right & (said == NO_ERROR),
        "unlabelled": truth == UNKNOWN,
    }


def own_counts(side: Side) -> dict[str, np.ndarray]:
    """OWN of each rollout, (rows,) each: status, units of what it answered, tokens and cost."""
    marks, offsets = side.marks, side.units.offsets
    marked, kept = row_sums(side.marked, offsets), row_sums(side.kept, offsets)
    answered = marks.answered
    counts = {
        **{status.value: marks.status == code for code, status in enumerate(STATUSES)},
        "units": np.where(answered, np.diff(offsets), 0),
        "marked": np.where(answered, marked, 0),
        "kept": np.where(answered, kept, 0),
        "cap_hits": answered & (marked > kept),
        **side.bills,
    }
    return {name: counts[name] for name in OWN}


def confusion(reference: Marks, other: Marks, rows: np.ndarray) -> np.ndarray:
    """Rollouts by both annotators' types, (TYPES, TYPES), the reference's in rows."""
    pairs = rows & (reference.type >= 0) & (other.type >= 0)
    flat = reference.type[pairs] * len(TYPES) + other.type[pairs]
    return np.bincount(flat, minlength=len(TYPES) ** 2).reshape(len(TYPES), len(TYPES))


# --- figures -------------------------------------------------------------------------------------


def cohen_kappa(
    units: np.ndarray, first: np.ndarray, second: np.ndarray, both: np.ndarray
) -> np.ndarray:
    """Cohen's κ of two markings of the same units (Cohen 1960, doi 10.1177/001316446002000104).

    κ = (p_o − p_e) / (1 − p_e): p_o is the share of units on which they agree (both mark, or
    neither does), p_e the share expected of independent markings with the same marginals. 1: they
    are equal, 0: as good as chance (so where one marks nothing and the other something), NaN where
    p_e is 1: both mark nothing, or both everything.
    """
    share = _ratio(first, units), _ratio(second, units)
    agreed = 1 - _ratio(first + second - 2 * both, units)
    expected = share[0] * share[1] + (1 - share[0]) * (1 - share[1])
    constant = ((first == 0) & (second == 0)) | ((first == units) & (second == units))
    return _ratio(agreed - expected, np.where(constant, 0.0, 1 - expected))


def figures(counts: Counts) -> dict[str, np.ndarray]:
    """FIGURES of summed COUNTS, of whatever shape these have.

    iou: units that both mark over units that either marks, NaN where neither marks any (counted per
    rollout as both_empty). segment_precision: of the segments that the other annotator marks, the
    share that the reference marks too; segment_recall the other way round; segment_f1 their
    harmonic mean. type_agreement: of the rollouts that both give a type, those with the same.
    wrong_accuracy, right_accuracy, first_error_f1: as in ProcessBench (arXiv 2412.06559): the first
    error found on responses that have one; "no error" said of those that have none; their harmonic
    mean.
    """
    c = counts
    marked = c["reference_marked"], c["other_marked"], c["both_marked"]
    kept = c["reference_kept"], c["other_kept"], c["both_kept"]
    precision = _ratio(c["both_segments"], c["other_segments"])
    recall = _ratio(c["both_segments"], c["reference_segments"])
    wrong, right = _ratio(c["wrong_hit"], c["wrong"]), _ratio(c["right_hit"], c["right"])
    return {
        "kappa": cohen_kappa(c["units"], *marked),
        "iou": _ratio(marked[2], marked[0] + marked[1] - marked[2]),
        "capped_kappa": cohen_kappa(c["units"], *kept),
        "capped_iou": _ratio(kept[2], kept[0] + kept[1] - kept[2]),
        "segment_precision": precision,
        "segment_recall": recall,
        "segment_f1": _ratio(2 * c["both_segments"], c["other_segments"] + c["reference_segments"]),
        "type_agreement": _ratio(c["same_type"], c["typed"]),
        "wrong_accuracy": wrong,
        "right_accuracy": right,
        "first_error_f1": _harmonic(wrong, right),
    }


def intervals(sums: np.ndarray, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Percentile 95 % intervals of FIGURES by resampling problems, (NaN, NaN) if there are none.

    sums: (problems, SHARED). The problem is the unit that is drawn: rollouts of one
    problem are alike, and drawn one by one they would pass for more than they are (cluster
    bootstrap). A resample in which a figure is undefined is left out of that figure's interval.
    """
    problems = len(sums)
    if problems < 2:
        return dict.fromkeys(FIGURES, (np.nan, np.nan))
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(SHARED)))
    step = max(1, 4_000_000 // problems)  # bounds the memory of the weights
    for start in range(0, resamples, step):
        chosen = (
            np.bincount(rng.integers(0, problems, problems), minlength=problems)
            for _ in range(start, min(start + step, resamples))
        )
        weights = np.stack(list(chosen)).astype(float)
        drawn[start : start + len(weights)] = weights @ sums
    values = figures(dict(zip(SHARED, drawn.T, strict=True)))
    return {name: _percentiles(values[name]) for name in FIGURES}


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


def _harmonic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """0 where both are 0, as in ProcessBench; NaN where one is."""
    total = first + second
    return np.where(total == 0, 0.0, _ratio(2 * first * second, total))
