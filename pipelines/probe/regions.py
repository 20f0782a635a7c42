"""From a probe's figures to the region of docs/study.md's map that they lie in, and to a preset.

probe.py calls `advice`. The thresholds are where the study's arms part from GRPO on that map: a
1 M-parameter policy that adds numbers. They show a direction, they are no law for other models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..statistics import Estimate

# Each lies between two points of docs/study.md. Claim c: all-token KL collapses where the teacher's
# responses have 0.78 times the student's tokens, and does no harm at 1.0. Claim a: RKL helps where
# 16 % of the groups have signal and 4 % of the responses are right, and not at 91 % and 27 %.
LABELS_ALIKE = 1.25  # KL on spans, right label to wrong label: alike within this factor
SHORTER = 0.8  # the teacher's tokens to the student's: below it the hint shortens
ELSEWHERE = 0.5  # KL elsewhere to KL on spans: above it the hint changes more than the spans
FEW_GROUPS = 0.6  # share of groups with right and wrong responses: below it signal is scarce
WEAK = 0.2  # pass rate: below it the policy is weak

GRPO, STARVED_PRESET = "grpo", "trace-rkl"


class Region(StrEnum):
    """A part of the map. DRIFT may hold together with STARVED or PLENTIFUL."""

    NO_CONTENT = "hint without content"
    DRIFT = "drift"
    STARVED = "starved"
    PLENTIFUL = "plentiful"


@dataclass(frozen=True)
class Finding:
    """A region, and a sentence with what was measured and its threshold."""

    region: Region
    text: str


@dataclass(frozen=True)
class Advice:
    """What holds, and the preset that the map has for it."""

    findings: list[Finding]
    preset: str


def advice(figures: Mapping[str, Estimate], groups_of: int) -> Advice:
    """The findings of a probe's figures (probe.py), and a preset.

    groups_of: responses in the groups of which `signal` is the share.
    """
    if (empty := _no_content(figures)) is not None:
        return Advice([empty], GRPO)
    starved, signal = _signal(figures, groups_of)
    return Advice([*_drift(figures), signal], STARVED_PRESET if starved else GRPO)


def _no_content(figures: Mapping[str, Estimate]) -> Finding | None:
    gain, alike = figures["right_label_gain"], figures["spans_right_to_wrong"]
    if gain.low > 0 or not 1 / LABELS_ALIKE <= alike.value <= LABELS_ALIKE:
        return None
    return Finding(
        Region.NO_CONTENT,
        f"The right label changes the pass rate by {points(gain)}, an interval that does not lie "
        f"above 0, and the KL on spans under it is {alike.value:.2f} times that under a wrong one "
        f"(alike: {1 / LABELS_ALIKE:.2g} to {LABELS_ALIKE:.3g}): the hint has no content, so no "
        "routing can bring any; use GRPO.",
    )


def _drift(figures: Mapping[str, Estimate]) -> list[Finding]:
    """A finding for each sign of drift."""
    found = []
    shorter, elsewhere = figures["right_label_length"], figures["elsewhere_to_spans"]
    if shorter.value < SHORTER:
        found.append(
            f"The teacher's responses have {shorter.value:.2f} times the student's tokens (drift: "
            f"below {SHORTER:.2g}): the hint shortens responses"
        )
    if elsewhere.value > ELSEWHERE:
        found.append(
            f"The KL elsewhere is {elsewhere.value:.2f} times that on spans (drift: above "
            f"{ELSEWHERE:.2g}): the hint changes more than the marked tokens"
        )
    return [Finding(Region.DRIFT, f"{text}; route spans only, never all tokens.") for text in found]


def _signal(figures: Mapping[str, Estimate], groups_of: int) -> tuple[bool, Finding]:
    signal, rate = figures["signal"].value, figures["pass_rate"].value
    starved = signal < FEW_GROUPS and rate < WEAK
    measured = (
        f"{signal:.1%} of the groups of {groups_of} have right and wrong responses (starved: below "
        f"{FEW_GROUPS:.0%}), and the pass rate is {rate:.1%} (starved: below {WEAK:.0%})"
    )
    if starved:
        text = f"{measured}: reverse KL on error spans teaches where GRPO has no signal."
        return True, Finding(Region.STARVED, text)
    text = f"{measured}: there is signal, and GRPO is as good as any."
    return False, Finding(Region.PLENTIFUL, text)


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
