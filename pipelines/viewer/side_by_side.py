"""Cuts a response into pieces by which of two annotators marks them.

rollout_view.py calls it for the two columns of a comparison.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from .paint import CharPaint, cut, paint_spans


class Agreement(IntEnum):
    """Who marks a character: neither annotator, both, only the first, only the second."""

    NEITHER = 0
    BOTH = 1
    ONLY_A = 2
    ONLY_B = 3


class ComparedPiece(NamedTuple):
    """A run of characters with one agreement, as one annotator's column shows it.

    span: rank of that annotator's span, −1 outside; segment: index of the annotator's segment that
    begins with this piece, else None.
    """

    text: str
    agreement: Agreement
    span: int
    segment: int | None


def compare_marks(
    text: str, first: dict, second: dict
) -> tuple[list[ComparedPiece], list[ComparedPiece]]:
    """The pieces of a response in each of two annotators' columns; texts are made `visible`.

    first, second: the rollout's rows in two annotations tables; their segments may differ.
    """
    ranks = [paint_spans(len(text), row["spans"]).span for row in (first, second)]
    agreement = _AGREEMENT[(ranks[0] >= 0).astype(int), (ranks[1] >= 0).astype(int)]
    a, b = (
        [
            ComparedPiece(shown, Agreement(value), span, segment)
            for shown, value, span, segment in cut(
                text, row["segments"], CharPaint(agreement, rank)
            )
        ]
        for row, rank in zip((first, second), ranks, strict=True)
    )
    return a, b


# Indices: whether the first annotator marks, whether the second one does.
_AGREEMENT = np.array(
    [[Agreement.NEITHER, Agreement.ONLY_B], [Agreement.ONLY_A, Agreement.BOTH]], dtype=np.uint8
)
