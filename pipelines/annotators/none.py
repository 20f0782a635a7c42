"""The annotator that is not asked: for routing that looks at no annotation."""

import pyarrow as pa

from ...schemas.configs import SegmentConfig
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
