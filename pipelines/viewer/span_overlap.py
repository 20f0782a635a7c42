"""How much of the responses two annotators mark alike, for all rollouts at once.

rollout_index.py calls it when a page compares two annotations datasets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc


@dataclass(frozen=True)
class SpanEnds:
    """Each span's rollout, first character and one past the last, (spans,) int64 each."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray


def span_ends(spans: Any) -> SpanEnds:
    """The ends in a column of lists of spans, an Arrow array; a null list holds none."""
    flat = pc.list_flatten(spans)
    start, end = (pc.struct_field(flat, name).to_numpy() for name in ("start", "end"))
    rows = pc.list_parent_indices(spans).to_numpy()
    return SpanEnds(rows, start.astype(np.int64), end.astype(np.int64))


def overlap(first: SpanEnds, second: SpanEnds, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters that both and that at least one of two annotators marks: two (rows,) int64 arrays.

    A sweep over the spans' ends, so the cost does not depend on text length. Spans of one annotator
    may overlap.
    """
    sides = (first, second)
    row = np.concatenate([np.tile(side.row, 2) for side in sides])
    at = np.concatenate([array for side in sides for array in (side.start, side.end)])
    opened = np.concatenate([np.repeat([1, -1], len(side.row)) for side in sides])
    is_first = np.arange(len(row)) < 2 * len(first.row)
    order = np.lexsort((at, row))
    row, at, opened, is_first = (array[order] for array in (row, at, opened, is_first))
    # Every span that opens in a row closes in it: the sums are 0 where a row begins.
    in_first = np.cumsum(np.where(is_first, opened, 0))[:-1] > 0
    in_second = np.cumsum(np.where(is_first, 0, opened))[:-1] > 0
    width = np.diff(at)
    both = np.bincount(row[:-1], width * (in_first & in_second), rows)
    either = np.bincount(row[:-1], width * (in_first | in_second), rows)
    return both.astype(np.int64), either.astype(np.int64)


def disagreement(
    both: np.ndarray, either: np.ndarray, types_differ: np.ndarray, comparable: np.ndarray
) -> np.ndarray:
    """1 − intersection over union of the marked characters, plus 1 where the types differ.

    All (rows,); float32 from 0 to 2. Annotators who both mark nothing agree. NaN where one of them
    gave no judgement.
    """
    apart = 1 - np.divide(both, either, out=np.ones(len(both)), where=either > 0)
    return np.where(comparable, apart + types_differ, np.nan).astype(np.float32)
