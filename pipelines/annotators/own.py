"""An annotator of your own: `annotator.engine=file.py:Class`. `OwnAnnotator` below is its manual.

The engine here cuts responses into segments, asks the class, checks its marks and makes the rows
of the annotations table. examples/own-code/annotator.py is a worked example.
"""

import operator
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from ...data.store import Dataset
from ...schemas.configs import OwnAnnotator as OwnAnnotatorConfig
from ...schemas.configs import SegmentConfig
from ...schemas.errors import InputError
from ...schemas.labels import TYPE_LABELS, AnnotationStatus, ErrorType, SpanKind, type_label
from ...schemas.own_code import OwnCode, build, is_text, iterable, require_methods, running
from ...schemas.tables import ANNOTATIONS
from . import Engine
from .answer_schema import MOST_REFLECTION_CHARS
from .rows import SKIPPED, Identity, Item, Reading, Usage, annotation_row, items

_STATUSES = [status for status in AnnotationStatus if status is not AnnotationStatus.SKIPPED]


class OwnAnnotator(Protocol):
    """A class that marks the key segments of right responses and the error segments of wrong ones.

    It is built with `options`, if its `__init__` names them: `annotator.options` of the config. If
    the class has an attribute `Options`, a dataclass or a pydantic model, they are validated by it
    and passed as its instance; else as a dict.

    `annotate` gets the scored rollouts of one part (`annotators.rows.Item`): `problem` is the row
    of table problems, `response` the text, `segments` its (start, end) characters, `text(i)` the
    text of segment i, `correct` the verdict. Rollouts without a verdict are skipped before.

    It returns, or yields, one `annotators.rows.Reading` per item, in order:

    - Reading("ok", [[3], [0, 1]], "setup"): spans of segment indices, the most important first, and
      a type: a member of `schemas.labels.DiagnosticType`, or of `ErrorType` for a wrong response,
      or its value. With `annotator.reflection` the field `reflection` of a wrong response's reading
      says what to do differently, in at most 600 characters.
    - Reading("empty"): nothing to mark. Reading("abstained"): it cannot tell.
    - Reading("failed", error="why"): this response could not be annotated.

    Stage annotate and online training use the same class. Optional: close().
    """

    def annotate(self, items: Sequence[Item]) -> Iterable[Reading]: ...


class OwnMarks:
    """The class as `trace.protocols.Annotator`."""

    def __init__(self, config: OwnAnnotatorConfig, segment: SegmentConfig) -> None:
        self._code = _load(config)
        self._own = build(self._code, config.options)
        self._segment = segment
        name = config.name or self._code.value.__name__
        self._who = Identity(name, "own", self._code.sha256[:16], reflects=config.reflection)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`.

        Raises:
            InputError: the class raises, or returns no reading for an item.
        """
        work = list(items(problems, rollouts, verdicts, self._segment))
        asked = [item for item in work if item.correct is not None]
        began = time.monotonic()
        with running(self._code):
            readings = list(iterable(self._code, "annotate", self._own.annotate(asked)))
        usage = Usage(latency_s=(time.monotonic() - began) / max(len(asked), 1))
        if len(readings) != len(asked):
            raise self._fault(f"returned {len(readings)} readings for {len(asked)} responses")
        marks = map(self._checked, asked, readings)
        return ANNOTATIONS.table(
            annotation_row(item, self._who, SKIPPED)
            if item.correct is None
            else annotation_row(item, self._who, next(marks), usage)
            for item in work
        )

    def close(self) -> None:
        if hasattr(self._own, "close"):
            with running(self._code):
                self._own.close()

    def _checked(self, item: Item, reading: Any) -> Reading:
        where = f"rollout {item.rollout_id}"
        if not isinstance(reading, Reading):
            raise self._fault(f"{where}: returned {type(reading).__name__}, not a Reading")
        try:
            status = AnnotationStatus(reading.status)
            kind = None if reading.type is None else type_label(reading.type)
        except ValueError as error:
            known = _STATUSES if "Status" in str(error) else TYPE_LABELS
            raise self._fault(f"{where}: {error}; known: {', '.join(known)}") from None
        if status is AnnotationStatus.SKIPPED:
            raise self._fault(f"{where}: status skipped is for responses without a verdict")
        try:
            marked = [[_index(index) for index in span] for span in reading.marked]
        except TypeError:
            raise self._fault(
                f"{where}: marked is {reading.marked!r:.80}, not a list of spans, each a list of "
                "segment indices"
            ) from None
        if isinstance(kind, ErrorType) and item.kind is SpanKind.KEY:
            raise self._fault(f"{where}: type {kind} names a mistake, and the response is right")
        if reading.error is not None and not is_text(reading.error):
            raise self._fault(f"{where}: error is {reading.error!r:.80}, not text")
        last = len(item.segments) - 1
        for index in (index for span in marked for index in span):
            if not 0 <= index <= last:
                raise self._fault(f"{where}: marks segment {index}, the response has 0 … {last}")
        if not all(marked):
            raise self._fault(f"{where}: a span names no segment")
        if bool(marked) != (status is AnnotationStatus.OK) or (marked and kind is None):
            raise self._fault(
                f"{where}: status {status} with {len(marked)} spans and type {kind}; status ok "
                "needs spans and a type, any other status has none"
            )
        reflection = self._reflection(reading.reflection, item, where)
        return Reading(status, marked, kind if marked else None, reading.error, reflection)

    def _reflection(self, text: Any, item: Item, where: str) -> str | None:
        if text is None:
            return None
        if not self._who.reflects:
            raise self._fault(f"{where}: has a reflection; set annotator.reflection=true")
        if item.kind is SpanKind.KEY:
            raise self._fault(f"{where}: has a reflection, and the response is right")
        if not is_text(text) or not 0 < len(text.strip()) <= MOST_REFLECTION_CHARS:
            raise self._fault(
                f"{where}: reflection is {text!r:.80}, not a text of at most "
                f"{MOST_REFLECTION_CHARS} characters"
            )
        return text

    def _fault(self, what: str) -> InputError:
        return InputError(f"{self._code.label}: {what}; see OwnAnnotator in {__name__}")


def _index(value: Any) -> int:
    """An integer of Python or numpy; no bool, float or text, whose meaning would be a guess."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _load(config: OwnAnnotatorConfig) -> OwnCode:
    code = config.load("annotator.engine")
    require_methods(code, annotate="items")
    return code


def _identity(config: OwnAnnotatorConfig, problems: Dataset, in_training: bool) -> dict[str, Any]:
    build(_load(config), config.options)  # bad options are found before the first row
    return {}


ENGINE = Engine(_identity, lambda config, segment, **_: OwnMarks(config, segment))
