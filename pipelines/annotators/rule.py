"""The exact annotator, engine `rule`: for problems whose right intermediate steps are known.

match=line: a response writes one step per line, and a line is right if it equals the known step.
Lines that begin with `#` are no steps.
match=value: a response is free text, judged by the equations that it states.

With `error_types` a wrong response's label is the mistake in a step of its type; with `reflection`
it gets the known step that it lacks.
"""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.store import Dataset
from ...schemas.configs import RuleAnnotator, SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import MISTAKE_IN, AnnotationStatus, DiagnosticType, SpanKind, TypeLabel
from ...schemas.tables import ANNOTATIONS
from . import Engine
from .answer_schema import MOST_REFLECTION_CHARS
from .equations import equations, value
from .rows import SKIPPED, Identity, Item, Reading, Usage, annotation_row, items

_FINAL = re.compile(r"\\boxed|\banswer\b", re.IGNORECASE)


class StepsAnnotator:
    """Marks by `problems.steps`; calls nothing and costs nothing."""

    def __init__(self, config: RuleAnnotator, segment: SegmentConfig) -> None:
        self._segment = segment
        self._config = config
        self._who = Identity(config.name, f"steps-{config.match}", reflects=config.reflection)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`.

        Raises:
            InputError: a problem has no known steps.
        """
        _require_steps(problems, "problems")
        rows = []
        for item in items(problems, rollouts, verdicts, self._segment):
            began = time.monotonic()
            reading = SKIPPED if item.correct is None else self._read(item)
            usage = Usage(latency_s=time.monotonic() - began)
            rows.append(annotation_row(item, self._who, reading, usage))
        return ANNOTATIONS.table(rows)

    def _read(self, item: Item) -> Reading:
        config = self._config
        reading = _RULES[config.match](item)
        if config.wrong_spans or config.wrong_types:
            reading = mistaken(reading, item, config.wrong_spans, config.wrong_types)
        if item.kind is SpanKind.KEY:
            return reading
        if config.error_types and isinstance(reading.type, DiagnosticType):
            reading = replace(reading, type=MISTAKE_IN[reading.type])
        if config.reflection:
            reading = replace(reading, reflection=_IDEAS[config.match](item))
        return reading

    def close(self) -> None:
        """Nothing to release."""


def _require_steps(problems: pa.Table, where: str) -> None:
    for row, steps in enumerate(problems["steps"].to_pylist()):
        if not steps:
            raise InputError(
                f"{where}, row {row}: steps is empty, and the rule annotator reads nothing else; "
                "use annotator.engine=openai or self, or problems from a source with known steps"
            )


def by_line(item: Item) -> Reading:
    """Key lines: those equal to a key step. Error: the first line that differs from its step."""
    steps = item.problem["steps"]
    lines = _step_lines(item)
    if item.correct:
        key_types = {step["text"].strip(): step["type"] for step in steps if step["key"]}
        key = [i for i in lines if item.text(i).strip() in key_types]
        return _reading([(i, key_types[item.text(i).strip()]) for i in key])
    for place, i in enumerate(lines):
        step = steps[min(place, len(steps) - 1)]  # surplus lines count against the last step
        if place >= len(steps) or item.text(i).strip() != step["text"].strip():
            return _reading([(i, step["type"])])
    return _reading([])


def _step_lines(item: Item) -> list[int]:
    """The segments that state steps."""
    texts = [item.text(i).strip() for i in range(len(item.segments))]
    return [i for i, text in enumerate(texts) if text and not text.startswith("#")]


def by_value(item: Item) -> Reading:
    """Key segments: the first to state each key step's value as the result of an equation.

    Error: the first false equation; else the first whose result is no step's; else the final
    answer.
    """
    steps = item.problem["steps"]
    stated = [
        (i, equation) for i in range(len(item.segments)) for equation in equations(item.text(i))
    ]
    if item.correct:
        found: dict[int, str] = {}
        for step in (step for step in steps if step["key"]):
            wanted = value(step["value"])
            states = (i for i, equation in stated if equation.result == wanted)
            if (first := next(states, None)) is not None:
                found.setdefault(first, step["type"])
        return _reading(sorted(found.items()))
    for i, equation in stated:
        if not equation.holds:
            return _reading([(i, DiagnosticType.ARITHMETIC)])
    known = {value(step["value"]) for step in steps}
    for i, equation in stated:
        if equation.result not in known:
            return _reading([(i, DiagnosticType.SETUP)])
    visible = [i for i in range(len(item.segments)) if item.text(i).strip()]
    final = [i for i in visible if _FINAL.search(item.text(i))]
    return _reading([(i, DiagnosticType.FINAL_ANSWER) for i in (final or visible)[-1:]])


def mistaken(reading: Reading, item: Item, wrong_spans: float, wrong_types: float) -> Reading:
    """A reading with mistakes at these rates, the same for each call about a rollout.

    A wrong mark goes to another segment; a wrong type is that of another step of the problem.
    """
    if reading.type is None:
        return reading
    rng = np.random.default_rng(list(item.rollout_id.encode()))
    right = {segment for span in reading.marked for segment in span}
    others = [i for i in range(len(item.segments)) if item.text(i).strip() and i not in right]
    marked = []
    for span in reading.marked:
        moves = others and rng.random() < wrong_spans
        marked.append([others.pop(int(rng.integers(len(others))))] if moves else span)
    kind = reading.type
    known: set[TypeLabel] = {DiagnosticType(step["type"]) for step in item.problem["steps"]}
    other_kinds = sorted(known - {kind})
    if other_kinds and rng.random() < wrong_types:
        kind = other_kinds[int(rng.integers(len(other_kinds)))]
    return replace(reading, marked=marked, type=kind)


def lacking_line(item: Item) -> str:
    """The corrective idea of `by_line`: the first known step whose line differs."""
    steps = item.problem["steps"]
    lines = [item.text(i).strip() for i in _step_lines(item)]
    pairs = zip(steps, [*lines, *[None] * len(steps)], strict=False)
    return idea(item, next((step for step, line in pairs if step["text"].strip() != line), None))


def lacking_value(item: Item) -> str:
    """The corrective idea of `by_value`: the first known step whose value is never stated."""
    texts = map(item.text, range(len(item.segments)))
    stated = {one.result for text in texts for one in equations(text) if one.holds}
    steps = item.problem["steps"]
    return idea(item, next((step for step in steps if value(step["value"]) not in stated), None))


def idea(item: Item, step: dict[str, Any] | None) -> str:
    """What to do differently in words, without the final answer. step: None, all are there."""
    text = "" if step is None else " ".join(step["text"].split())
    if step is None or step["value"] == item.problem["answer"] or _FINAL.search(text):
        return "check that the answer is what the steps give"
    return f"work out this step: {text}"[:MOST_REFLECTION_CHARS]


_RULES: dict[str, Callable[[Item], Reading]] = {"line": by_line, "value": by_value}
_IDEAS: dict[str, Callable[[Item], str]] = {"line": lacking_line, "value": lacking_value}


def _reading(marked: list[tuple[int, str]]) -> Reading:
    """Segments and their types, most important first; the first type stands for all."""
    if not marked:
        return Reading(AnnotationStatus.EMPTY)
    return Reading(AnnotationStatus.OK, [[i] for i, _ in marked], DiagnosticType(marked[0][1]))


def _identity(config: RuleAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    for part in range(problems.parts):
        _require_steps(problems.read_part(part, ["steps"]), f"{problems.ref}, part {part}")
    return {}


ENGINE = Engine(_identity, lambda config, segment, **_: StepsAnnotator(config, segment))
