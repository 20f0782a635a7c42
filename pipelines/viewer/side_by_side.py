"""A response as two annotators marked it, in pieces that say which of them marks what."""

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
    """A run of characters of one agreement, as one annotator's side shows it.

    span: rank of that annotator's span, −1 outside; segment: index of its segment that begins with
    this piece, else None.
    """

    text: str
    agreement: Agreement
    span: int
    segment: int | None


def compare_marks(
    text: str, first: dict, second: dict
) -> tuple[list[ComparedPiece], list[ComparedPiece]]:
    """A response in pieces as each of two annotators' sides shows it; texts are made `visible`.

    first, second: the rollout's rows of two annotations tables, which may be segmented differently.
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


# By whether the first and whether the second annotator marks.
_AGREEMENT = np.array(
    [[Agreement.NEITHER, Agreement.ONLY_B], [Agreement.ONLY_A, Agreement.BOTH]], dtype=np.uint8
)
