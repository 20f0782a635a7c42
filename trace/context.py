"""What a response's teacher is told besides the problem (`routing.teacher_context`).

TRACE's teacher is told the type label and nothing else. The other contexts are the baselines':
there the teacher reads an answer, a reference solution or another response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..schemas.configs import RoutingConfig
from .advantage import Scored


@dataclass(frozen=True)
class TeacherContext:
    """label: one of DiagnosticType, or None; text: None where the label is all that is told."""

    label: str | None
    text: str | None


def teacher_contexts(
    scored: Sequence[Scored],
    problems: dict[str, dict[str, Any]],
    labels: Sequence[str | None],
    config: RoutingConfig,
) -> list[TeacherContext | None]:
    """Each response's context, None where it does not exist: without it there is no teacher.

    problems: rows of the problems table by id; labels: diagnostic types of the responses.
    """
    if config.teacher_context == "type":
        return [TeacherContext(label, None) if label else None for label in labels]
    if config.teacher_context == "peer":
        texts = peers(scored)
    else:
        texts = [problems[s.rollout["problem_id"]][config.teacher_context] for s in scored]
    return [
        TeacherContext(label, text) if text else None
        for label, text in zip(labels, texts, strict=True)
    ]


def peers(scored: Sequence[Scored]) -> list[str | None]:
    """For each response the first other correct one of its group, by sample index (SDPO, arXiv
    2601.20802); None where there is no other."""
    correct: dict[str, list[Scored]] = {}
    for one in sorted(scored, key=lambda one: one.rollout["sample_index"]):
        if one.correct:
            correct.setdefault(one.rollout["group_id"], []).append(one)
    return [
        next(
            (
                other.rollout["response"]
                for other in correct.get(one.rollout["group_id"], [])
                if other is not one
            ),
            None,
        )
        for one in scored
    ]
