"""The annotator that marks nothing: for routing that reads no annotation."""

from typing import Any

import pyarrow as pa

from ...data.store import Dataset
from ...schemas.configs import NoAnnotator, SegmentConfig
from ...schemas.errors import InputError
from . import Engine
from .rows import skipped_annotations


class NobodyAnnotator:
    """Marks nothing; calls nothing and costs nothing."""

    def __init__(self, segment: SegmentConfig) -> None:
        self._segment = segment

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`; each row is skipped."""
        return skipped_annotations(problems, rollouts, verdicts, self._segment)

    def close(self) -> None:
        """Nothing to release."""


def _identity(config: NoAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    if in_training:
        raise InputError(
            "online.annotator.engine is none, and online.routing reads annotations; name an "
            "engine that makes them, or another routing.rule and teacher_context"
        )
    return {}


ENGINE = Engine(_identity, lambda config, segment, **_: NobodyAnnotator(segment))
