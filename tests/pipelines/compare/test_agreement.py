"""Figures of agreement on examples small enough to check by hand, and against slow twins."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.pipelines.compare.agreement import (
    COUNTS,
    SHARED,
    Side,
    cohen_kappa,
    figures,
    intervals,
    shared_counts,
)
from trace_opd.pipelines.compare.marks import (
    TYPES,
    capped_mask,
    character_units,
    marks_of,
    row_sums,
    unit_mask,
)
from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.labels import SpanKind
from trace_opd.schemas.tables import ANNOTATIONS
from trace_opd.trace.route import route_tokens
from trace_opd.trace.rule_inputs import Response

BILLS = ("prompt_tokens", "completion_tokens", "cost_usd")


def annotations(rows: list[dict]) -> pa.Table:
    """Annotations of texts of segments of given lengths; spans are lists of segment indices."""
    table = []
    for index, row in enumerate(rows):
        ends = np.cumsum(row["lengths"]).tolist()
        starts = [0, *ends][: len(ends)]
        kind = row.get("kind", "key" if row["correct"] else "error")
        table.append(
            {
                "rollout_id": f"r{index}",
                "problem_id": row.get("problem", "p"),
                "group_id": "g",
                "correct": row["correct"],
                "segments": [
                    {"start": start, "end": end} for start, end in zip(starts, ends, strict=True)
                ],
                "spans": [
                    {
                        "segments": span,
                        "kind": kind,
                        "rank": rank,
                        "start": starts[span[0]],
                        "end": ends[span[-1]],
                        "text": "x",
                    }
                    for rank, span in enumerate(row["spans"])
                ],
                "diagnostic_type": row.get("type"),
                "status": row.get("status", "ok" if row["spans"] else "empty"),
                "annotator_name": "test",
                "annotator_model": "test",
                "prompt_version": "",
                "raw_answer": None,
                "error": None,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "cost_usd": 0.0,
                "latency_s": 0.0,
            }
        )
    return ANNOTATIONS.table(table)


def side(rows: list[dict], alpha: float = 0.25) -> Side:
    marks = marks_of(annotations(rows))
    units = character_units(marks)
    mask = unit_mask(marks, units)
    bills = {name: np.zeros(marks.rows) for name in BILLS}
    return Side(marks, units, mask, capped_mask(marks, units, mask, alpha), bills)


def agreed(first: list[dict], second: list[dict], alpha: float = 0.25) -> dict[str, float]:
    """Counts and figures of two annotators, summed over rows."""
    counts = {n: v.sum() for n, v in shared_counts(side(first, alpha), side(second, alpha)).items()}
    return {n: float(v) for n, v in (counts | figures(counts)).items()}


def row(lengths, *spans, correct=True, **more) -> dict:
    return {"lengths": lengths, "spans": list(spans), "correct": correct} | more


def test_a_worked_example():
    # 10 characters. One marks segments 0 and 1 (4 characters), the other 1 and 2 (5), both 1 (3).
    first = [row([1, 3, 2, 4], [0], [1])]
    second = [row([1, 3, 2, 4], [1, 2])]
    figure = agreed(first, second)
    # Agreed on 3 + 4 of 10; expected 0.4 · 0.5 + 0.6 · 0.5 = 0.5.
    assert figure["kappa"] == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert figure["iou"] == pytest.approx(3 / 6)
    assert figure["segment_precision"] == figure["segment_recall"] == 1 / 2
    # α = 0.25 keeps 2 characters: only segment 0 of one, the first two of segment 1 of the other.
    assert (figure["reference_kept"], figure["other_kept"], figure["both_kept"]) == (1, 2, 0)


def test_two_annotators_that_mark_nothing_have_no_kappa_and_no_overlap_and_are_counted():
    figure = agreed([row([3, 3])], [row([3, 3])])
    assert math.isnan(figure["kappa"])
    assert math.isnan(figure["iou"])
    assert (figure["judged"], figure["both_empty"], figure["units"]) == (1, 1, 6)


def test_two_annotators_that_mark_everything_have_no_kappa_and_full_overlap():
    figure = agreed([row([3, 3], [0, 1])], [row([3, 3], [0], [1])])
    assert math.isnan(figure["kappa"])
    assert figure["iou"] == 1


def test_one_annotator_that_marks_nothing_agrees_as_chance_does():
    figure = agreed([row([3, 3], [0])], [row([3, 3])])
    assert (figure["kappa"], figure["iou"], figure["both_empty"]) == (0, 0, 0)
    assert math.isnan(figure["segment_precision"])
    assert figure["segment_recall"] == 0


def test_an_empty_response_counts_no_units():
    figure = agreed([row([], status="empty"), row([2], [0])], [row([], status="empty"), row([2])])
    assert (figure["units"], figure["both_empty"]) == (2, 1)


@pytest.mark.parametrize("status", ["invalid", "failed", "abstained", "skipped"])
def test_rows_that_one_annotator_did_not_answer_are_counted_and_left_out(status):
    answered, silent = row([2, 2], [0]), row([2, 2], status=status)
    figure = agreed([answered, answered, silent, silent], [answered, silent, answered, silent])
    names = ("judged", "only_reference", "only_other", "neither", "units")
    assert [figure[name] for name in names] == [1, 1, 1, 1, 4]
    assert figure["iou"] == 1


def test_rows_searched_for_different_kinds_are_no_agreement():
    figure = agreed([row([2, 2], [0], correct=False)], [row([2, 2], [0], correct=True)])
    assert (figure["asked_differently"], figure["judged"]) == (1, 0)
    assert math.isnan(figure["iou"])


def test_other_segments_leave_units_comparable_and_segments_not():
    figure = agreed([row([2, 2, 2], [0])], [row([4, 2], [0])])
    assert figure["iou"] == 2 / 4
    assert figure["same_segments"] == 0
    assert math.isnan(figure["segment_f1"])


def test_one_row_cut_differently_does_not_shift_the_others():
    first = [row([2, 2, 2], [0]), row([1, 5], [1])]
    second = [row([4, 2], [0]), row([1, 5], [1])]
    figure = agreed(first, second)
    assert figure["same_segments"] == 1
    assert figure["segment_f1"] == 1


def test_types_are_compared_where_both_give_one():
    first = [row([1], [0], type="setup"), row([1], [0], type="other"), row([1], [0])]
    second = [row([1], [0], type="setup"), row([1], [0], type="counting"), row([1], [0])]
    figure = agreed(first, second)
    assert (figure["typed"], figure["type_agreement"]) == (2, 0.5)


# --- first errors --------------------------------------------------------------------------------


def test_first_errors_are_scored_as_in_processbench():
    wrong = {"correct": False}
    truth = [
        row([2, 2, 2], [1], **wrong),
        row([2, 2, 2], [1], **wrong),
        row([2, 2, 2], [1], **wrong),
        row([2, 2, 2], **wrong),  # answered, without an error
        row([2, 2, 2], [0], correct=True),  # key spans: right
    ]
    said = [
        row([2, 2, 2], [2], [1], **wrong),  # the first in the text is 1
        row([2, 2, 2], [1], [0], **wrong),  # claims an earlier error
        row([2, 2, 2], status="invalid", **wrong),
        row([2, 2, 2], [2], **wrong),  # sees an error where there is none
        row([2, 2, 2], correct=True),
    ]
    figure = agreed(truth, said)
    assert (figure["wrong"], figure["wrong_hit"]) == (3, 1)
    assert (figure["right"], figure["right_hit"]) == (2, 1)
    assert figure["first_error_f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_a_step_of_several_segments_is_found_by_any_of_them():
    truth = [row([2, 2, 2, 2], [1, 2], correct=False)] * 3
    said = [row([2, 2, 2, 2], [i], correct=False) for i in (1, 2, 3)]
    assert agreed(truth, said)["wrong_hit"] == 2


def test_a_reference_without_an_answer_on_a_wrong_response_is_no_measure():
    truth = [row([2], status="abstained", correct=False), row([2], status="failed", correct=True)]
    figure = agreed(truth, [row([2], [0], correct=False), row([2], correct=True)])
    assert (figure["unlabelled"], figure["wrong"], figure["right"]) == (2, 0, 0)


def test_an_error_in_a_response_with_the_right_answer_is_an_error():
    truth = [row([2, 2], [1], correct=True, kind="error")]
    figure = agreed(truth, [row([2, 2], [1], correct=True)])  # marks it as key
    assert (figure["wrong"], figure["wrong_hit"], figure["asked_differently"]) == (1, 0, 1)


def test_f1_is_zero_where_nothing_is_found():
    counts = {name: np.array(0.0) for name in COUNTS} | {
        "wrong": np.array(4.0),
        "right": np.array(4.0),
    }
    assert figures(counts)["first_error_f1"] == 0


# --- twins ---------------------------------------------------------------------------------------


def slow_kappa(pairs: list[tuple[bool, bool]]) -> Fraction | None:
    n = len(pairs)
    agreed_on = Fraction(sum(a == b for a, b in pairs), n)
    a, b = Fraction(sum(x for x, _ in pairs), n), Fraction(sum(y for _, y in pairs), n)
    expected = a * b + (1 - a) * (1 - b)
    return (agreed_on - expected) / (1 - expected) if expected != 1 else None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_is_cohens(pairs):
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    counts = (len(pairs), first.sum(), second.sum(), (first & second).sum())
    kappa = float(cohen_kappa(*(np.array(float(count)) for count in counts)))
    expected = slow_kappa(pairs)
    assert math.isnan(kappa) if expected is None else kappa == pytest.approx(float(expected))


@st.composite
def marked_rows(draw):
    lengths = draw(st.lists(st.integers(0, 6), max_size=6))
    order = draw(st.permutations(range(len(lengths))))
    return row(lengths, *([i] for i in order[: draw(st.integers(0, len(lengths)))]))


@settings(max_examples=200)
@given(st.lists(marked_rows(), min_size=1, max_size=4), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_the_cap_is_the_one_of_training(rows, alpha):
    own = side(rows, alpha)
    kept = []
    for one in rows:
        token_segment = np.repeat(np.arange(len(one["lengths"])), one["lengths"])
        response = Response(
            "r",
            token_segment,
            np.zeros(len(token_segment)),
            token_segment,
            one["spans"],
            SpanKind.KEY,
            alpha,
        )
        kept.append(route_tokens(response, RoutingConfig(alpha=alpha)).span_id >= 0)
    assert np.array_equal(own.capped, np.concatenate(kept))


def test_row_sums_know_empty_rows():
    offsets = np.array([0, 2, 2, 5])
    assert row_sums(np.array([1, 2, 3, 4, 5]), offsets).tolist() == [3, 0, 12]


# --- intervals -----------------------------------------------------------------------------------


def problem_sums(problems: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    sums = np.zeros((problems, len(SHARED)))
    units, marked = rng.integers(50, 100, problems), rng.integers(1, 20, problems)
    for name, values in {
        "units": units,
        "reference_marked": marked,
        "other_marked": marked + 3,
        "both_marked": rng.integers(0, marked + 1),
    }.items():
        sums[:, SHARED.index(name)] = values
    return sums


def test_intervals_resample_problems():
    sums = problem_sums(40)
    low, high = intervals(sums, 500, seed=3)["iou"]
    rng = np.random.default_rng(3)
    values = []
    for _ in range(500):
        total = sum(sums[index] for index in rng.integers(0, 40, 40))
        counts = dict(zip(SHARED, total, strict=True))
        either = counts["reference_marked"] + counts["other_marked"] - counts["both_marked"]
        values.append(counts["both_marked"] / either)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_intervals_hold_the_figure_and_follow_the_seed():
    sums = problem_sums(200)
    value = figures(dict(zip(SHARED, sums.sum(axis=0), strict=True)))["kappa"]
    low, high = intervals(sums, 300, seed=0)["kappa"]
    assert low < value < high
    assert intervals(sums, 300, seed=0)["kappa"] == (low, high)
    assert intervals(sums, 300, seed=1)["kappa"] != (low, high)


def test_one_problem_has_no_interval():
    assert all(map(math.isnan, intervals(problem_sums(1), 200, seed=0)["kappa"]))


def test_every_type_has_a_place():
    marks = marks_of(annotations([row([1], [0], type=str(label)) for label in TYPES]))
    assert marks.type.tolist() == list(range(len(TYPES)))
