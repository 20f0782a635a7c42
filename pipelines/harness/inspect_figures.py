"""avg@k, pass@k and maj@k with intervals for Inspect, by the rules of stage evaluate.

A score's value is C or I, or unscored. Its metadata has the verdict: `inspect_tasks.answer_verdict`
writes it. Inspect reduces a problem's k scores to one, and the metric sums the problems up.
"""

import math

import numpy as np
from inspect_ai.scorer import (  # pyright: ignore[reportMissingImports] - the extra harness
    CORRECT,
    Metric,
    SampleScore,
    Score,
    ScoreReducer,
    metric,
    score_reducer,
)

from ..stages.evaluate import majority_correct
from ..statistics import bootstrap_mean

VERDICT = "verdict"  # of a score's metadata


def _scored(scores: list[Score]) -> list[bool]:
    return [score.value == CORRECT for score in scores if isinstance(score.value, str)]


def _reduced(value: float | None, scores: list[Score]) -> Score:
    """One score of a problem's; NaN, Inspect's mark of the unscored, if nothing was scored."""
    marks = ", ".join(str(score.value) for score in scores)
    return Score(value=math.nan if value is None else value, explanation=marks)


@score_reducer(name="avg_at")
def avg_at(k: int) -> ScoreReducer:
    """The share of right responses among the scored ones. k: the epochs, for the figure's name."""

    def reduce(scores: list[Score]) -> Score:
        marks = _scored(scores)
        return _reduced(sum(marks) / len(marks) if marks else None, scores)

    return reduce


@score_reducer(name="pass_at")
def pass_at(k: int) -> ScoreReducer:
    """Whether any response is right. k: the epochs, for the figure's name."""

    def reduce(scores: list[Score]) -> Score:
        marks = _scored(scores)
        return _reduced(float(any(marks)) if marks else None, scores)

    return reduce


@score_reducer(name="maj_at")
def maj_at(k: int) -> ScoreReducer:
    """Chance that the commonest answer is right. k: the epochs, for the figure's name."""

    def reduce(scores: list[Score]) -> Score:
        verdicts = [
            score.metadata[VERDICT]
            for score in scores
            if isinstance(score.value, str) and score.metadata
        ]
        judged = {
            verdict["rollout_id"]: verdict["answer_correct"]
            for verdict in verdicts
            if verdict["answer_correct"] is not None
        }
        return _reduced(majority_correct(verdicts, judged), scores)

    return reduce


@metric
def estimate(resamples: int, seed: int) -> Metric:
    """The mean and its 95 % interval; of several sources the unweighted mean, and each one's."""

    def figures(scores: list[SampleScore]) -> dict[str, float]:
        rows = sorted(scores, key=lambda one: str(one.sample_id))
        values = np.array([one.score.value for one in rows], dtype=float)
        sources = np.array([(one.sample_metadata or {}).get("source", "") for one in rows])
        found = bootstrap_mean(values, sources, resamples, seed)
        own = {"mean": found.value, "low": found.low, "high": found.high}
        names = np.unique(sources).tolist()
        return own | {
            name: float(values[sources == name].mean()) for name in names if len(names) > 1
        }

    return figures
