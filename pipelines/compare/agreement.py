"""Agreement of two annotators: counts per rollout (compare.py), figures and intervals (table.py).

Counts are summed over rollouts before a figure is computed, per problem and over all problems, so a
long response weighs more than a short one. Undefined figures (a share of nothing, κ where no
disagreement is possible) are NaN, null in tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...schemas.labels import AnnotationStatus
from ..statistics import percentiles, resampled
from .marks import NO_ERROR, STATUSES, TYPES, UNKNOWN, Marks, Units, row_sums

# Counts of a rollout's two annotations.
SHARED = (
    "judged", "only_reference", "only_other", "neither", "asked_differently", "both_empty", "units",
    "reference_marked", "other_marked", "both_marked", "reference_kept", "other_kept", "both_kept",
    "same_segments", "reference_segments", "other_segments", "both_segments", "typed", "same_type",
    "wrong", "wrong_hit", "right", "right_hit", "unlabelled",
)  # fmt: skip
# Counts of each annotation alone.
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

    mask, capped: (units,) bool, the units that they cover before and after the cap; bills: (rows,)
    floats of prompt_tokens, completion_tokens, cost_usd, NaN where unknown.
    """

    marks: Marks
    units: Units
    mask: np.ndarray
    capped: np.ndarray
    bills: Counts


def shared_counts(reference: Side, other: Side) -> dict[str, np.ndarray]:
    """SHARED of each rollout, (rows,) each.

    Agreement is counted over the `judged` rollouts: both annotators answered (ok or empty) and
    searched for the same kind of span. The others are counted by what is missing.
    """
    offsets = reference.units.offsets
    first, second = reference.marks, other.marks
    both = first.answered & second.answered
    judged = both & (first.kind == second.kind)
    typed = judged & (first.type >= 0) & (second.type >= 0)
    covers = {
        "reference_marked": reference.mask,
        "other_marked": other.mask,
        "both_marked": reference.mask & other.mask,
        "reference_kept": reference.capped,
        "other_kept": other.capped,
        "both_kept": reference.capped & other.capped,
    }
    counts = {
        "judged": judged,
        "only_reference": first.answered & ~second.answered,
        "only_other": second.answered & ~first.answered,
        "neither": ~first.answered & ~second.answered,
        "asked_differently": both & ~judged,
        "units": np.where(judged, np.diff(offsets), 0),
        **{name: np.where(judged, row_sums(mask, offsets), 0) for name, mask in covers.items()},
        **_segment_counts(first, second, judged),
        "typed": typed,
        "same_type": typed & (first.type == second.type),
        **_first_error_counts(first, second),
    }
    counts["both_empty"] = judged & (counts["reference_marked"] + counts["other_marked"] == 0)
    return {name: counts[name] for name in SHARED}


def _segment_counts(first: Marks, second: Marks, judged: np.ndarray) -> dict[str, np.ndarray]:
    """Marked segments of the judged rollouts whose segments are the same for both annotators."""
    if np.array_equal(first.segment_offsets, second.segment_offsets):
        differ = row_sums(first.segment_ends != second.segment_ends, first.segment_offsets) > 0
    else:
        cuts = (first.segments(row) != second.segments(row) for row in range(first.rows))
        differ = np.fromiter(cuts, dtype=bool, count=first.rows)
    same = judged & ~differ

    def of_same(marks: Marks, mask: np.ndarray) -> np.ndarray:
        return np.where(same, row_sums(mask, marks.segment_offsets), 0)

    # The second annotator's marks on the first one's segments, in rows where they are the same.
    row = np.repeat(np.arange(first.rows), np.diff(first.segment_offsets))
    place = np.arange(len(row)) - first.segment_offsets[row] + second.segment_offsets[row]
    matched = same[row]
    aligned = np.zeros(len(row), dtype=bool)
    aligned[matched] = second.segment_mask[place[matched]]
    return {
        "same_segments": same,
        "reference_segments": of_same(first, first.segment_mask),
        "other_segments": of_same(second, second.segment_mask),
        "both_segments": of_same(first, first.segment_mask & aligned),
    }


def _first_error_counts(reference: Marks, other: Marks) -> dict[str, np.ndarray]:
    """Rollouts by the reference's first error, and whether the other annotator found it.

    A hit: the other's first marked character lies in the reference's first error span. With equal
    segments, one per step, its first marked segment is then the first wrong one. On a response
    without an error a hit is an annotation without errors. An annotator without an answer misses.
    """
    truth, found = reference.first_error, other.first_error
    wrong, right = truth >= 0, truth == NO_ERROR
    return {
        "wrong": wrong,
        "wrong_hit": wrong & (found >= truth) & (found < reference.first_error_end),
        "right": right,
        "right_hit": right & (found == NO_ERROR),
        "unlabelled": truth == UNKNOWN,
    }


def own_counts(side: Side) -> dict[str, np.ndarray]:
    """OWN of each rollout, (rows,) each: status, units of answered rollouts, tokens and cost."""
    marks, offsets = side.marks, side.units.offsets
    marked, kept = row_sums(side.mask, offsets), row_sums(side.capped, offsets)
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
    """Number of rollouts by both annotators' types: (TYPES, TYPES), the reference's in rows."""
    pairs = rows & (reference.type >= 0) & (other.type >= 0)
    flat = reference.type[pairs] * len(TYPES) + other.type[pairs]
    return np.bincount(flat, minlength=len(TYPES) ** 2).reshape(len(TYPES), len(TYPES))


# --- figures -------------------------------------------------------------------------------------


def cohen_kappa(
    units: np.ndarray, first: np.ndarray, second: np.ndarray, both: np.ndarray
) -> np.ndarray:
    """Cohen's κ of two markings of the same units (Cohen 1960, doi 10.1177/001316446002000104).

    κ = (p_o − p_e) / (1 − p_e): p_o is the share of units on which they agree (both mark, or
    neither does), p_e the share expected of independent markings with the same marginals. 1: equal;
    0: no better than chance, also where only one marks anything; NaN where p_e is 1: both mark
    nothing, or both everything.
    """
    share = _ratio(first, units), _ratio(second, units)
    agreed = 1 - _ratio(first + second - 2 * both, units)
    expected = share[0] * share[1] + (1 - share[0]) * (1 - share[1])
    constant = ((first == 0) & (second == 0)) | ((first == units) & (second == units))
    return _ratio(agreed - expected, np.where(constant, 0.0, 1 - expected))


def figures(counts: Counts) -> dict[str, np.ndarray]:
    """FIGURES of summed COUNTS; they have the counts' shape.

    iou: units that both mark over units that either marks, NaN where neither marks any (counted per
    rollout as both_empty). segment_precision: share of the other annotator's marked segments that
    the reference marks too; segment_recall: the reverse; segment_f1: their harmonic mean.
    type_agreement: share of the rollouts with two types whose types are equal. wrong_accuracy,
    right_accuracy, first_error_f1: as in ProcessBench (arXiv 2412.06559): share of the wrong
    responses whose first error is found, of the others that are found free of errors, and their
    harmonic mean.
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

    sums: (problems, SHARED). Problems are drawn, not rollouts, because rollouts of one problem are
    alike (cluster bootstrap). A figure's interval leaves out resamples in which it is undefined.
    """
    problems = len(sums)
    if problems < 2:
        return dict.fromkeys(FIGURES, (np.nan, np.nan))

    def drawn_sums(index: np.ndarray) -> np.ndarray:
        weights = np.stack([np.bincount(drawn, minlength=problems) for drawn in index])
        return weights.astype(float) @ sums

    drawn = resampled(drawn_sums, [problems], resamples, np.random.default_rng(seed))
    values = figures(dict(zip(SHARED, drawn.T, strict=True)))
    return {name: percentiles(values[name]) for name in FIGURES}


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    part, total = np.asarray(part, dtype=float), np.asarray(total, dtype=float)
    return np.divide(part, total, out=np.full(np.shape(total), np.nan), where=total != 0)


def _harmonic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """0 where both are 0, as in ProcessBench; NaN where one is."""
    total = first + second
    return np.where(total == 0, 0.0, _ratio(2 * first * second, total))
