"""From figures to findings and a preset."""

from pathlib import Path

import pytest

from trace_opd.pipelines.probe.regions import (
    ELSEWHERE,
    FEW_GROUPS,
    LABELS_ALIKE,
    SHORTER,
    WEAK,
    Region,
    advice,
)
from trace_opd.pipelines.statistics import Estimate
from trace_opd.schemas.presets import PRESETS

# A policy with signal whose hint has content and stays on the spans.
PLAIN = {
    "pass_rate": 0.4,
    "signal": 0.9,
    "right_label_gain": 0.2,
    "right_label_length": 1.0,
    "spans_right_to_wrong": 3.0,
    "elsewhere_to_spans": 0.1,
}


def found(**changes: float):
    """The regions and the preset of PLAIN with changes; the intervals are ± 0.05."""
    values = PLAIN | changes
    got = advice({name: Estimate(v, v - 0.05, v + 0.05) for name, v in values.items()}, 8)
    assert got.preset in PRESETS
    return [finding.region for finding in got.findings], got.preset, got.findings


@pytest.mark.parametrize(
    ("changes", "regions", "preset"),
    [
        ({}, [Region.PLENTIFUL], "grpo"),
        ({"signal": 0.5, "pass_rate": 0.1}, [Region.STARVED], "trace-rkl"),
        ({"signal": 0.5}, [Region.PLENTIFUL], "grpo"),
        ({"pass_rate": 0.1}, [Region.PLENTIFUL], "grpo"),
        ({"signal": FEW_GROUPS, "pass_rate": 0.1}, [Region.PLENTIFUL], "grpo"),
        ({"signal": 0.5, "pass_rate": WEAK}, [Region.PLENTIFUL], "grpo"),
        ({"right_label_length": SHORTER - 0.01}, [Region.DRIFT, Region.PLENTIFUL], "grpo"),
        ({"right_label_length": SHORTER}, [Region.PLENTIFUL], "grpo"),
        ({"elsewhere_to_spans": ELSEWHERE + 0.01}, [Region.DRIFT, Region.PLENTIFUL], "grpo"),
        (
            {"elsewhere_to_spans": 0.8, "right_label_length": 0.4, "signal": 0.1, "pass_rate": 0.0},
            [Region.DRIFT, Region.DRIFT, Region.STARVED],
            "trace-rkl",
        ),
    ],
)
def test_drift_holds_together_with_what_the_signal_says(changes, regions, preset):
    assert found(**changes)[:2] == (regions, preset)


@pytest.mark.parametrize(
    ("gain", "alike", "empty"),
    [
        (0.04, 1.0, True),  # its interval reaches −0.01
        (0.06, 1.0, False),
        (0.0, LABELS_ALIKE, True),
        (0.0, LABELS_ALIKE + 0.01, False),
        (0.0, 1 / LABELS_ALIKE - 0.01, False),
        (-0.3, 0.9, True),
    ],
)
def test_a_hint_without_content_neither_helps_nor_differs_from_a_wrong_one(gain, alike, empty):
    starved = {"signal": 0.1, "pass_rate": 0.05}
    changes = {"right_label_gain": gain, "spans_right_to_wrong": alike} | starved
    assert found(**changes)[:2] == (
        ([Region.NO_CONTENT], "grpo") if empty else ([Region.STARVED], "trace-rkl")
    )


def test_a_finding_has_what_was_measured_and_the_threshold():
    _, _, (shorter, elsewhere, signal) = found(
        right_label_length=0.41, elsewhere_to_spans=0.83, signal=0.31, pass_rate=0.07
    )
    assert "0.41 times" in shorter.text
    assert "below 0.8" in shorter.text
    assert "0.83 times" in elsewhere.text
    assert "above 0.5" in elsewhere.text
    assert "31.0% of the groups of 8" in signal.text
    assert "pass rate is 7.0% (starved: below 20%)" in signal.text
    _, _, (empty,) = found(right_label_gain=0.01, spans_right_to_wrong=1.02)
    assert "+1.0 points (-4.0 to +6.0)" in empty.text
    assert "1.02 times" in empty.text
    assert "0.8 to 1.25" in empty.text
    for finding in (shorter, elsewhere, signal, empty):
        assert finding.text.count(". ") == 0  # one sentence


def test_the_page_names_the_thresholds():
    page = (Path(__file__).parents[3] / "docs" / "probe.md").read_text()
    for text in (
        f"within a factor of {LABELS_ALIKE:.3g} of",
        f"less than {SHORTER:.2g} of the student's",
        f"more than {ELSEWHERE:.2g} of that on spans",
        f"signal below {100 * FEW_GROUPS:.0f} % and pass rate below {100 * WEAK:.0f} %",
    ):
        assert text in page
