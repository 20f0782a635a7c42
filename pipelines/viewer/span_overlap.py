"""How much of the responses two annotators mark alike, over whole tables at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from ...data.store import Dataset


@dataclass(frozen=True)
class SpanEnds:
    """All spans of a list of rollouts: each one's row, first character and one past the last, int64."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray


def read_span_ends(annotations: Dataset, numbers: np.ndarray) -> SpanEnds:
    """The spans of an annotations dataset without their texts, read part by part.

    numbers: (rows,) int64, the row number in the dataset of each row of a list, −1 for none.
    """
    row_of = np.full(annotations.rows, -1, dtype=np.int64)
    row_of[numbers[numbers >= 0]] = np.flatnonzero(numbers >= 0)
    rows, starts, ends, seen = [], [], [], 0
    for part in range(annotations.parts):
        spans = annotations.read_part(part, ["spans"])["spans"].combine_chunks()
        flat = pc.list_flatten(spans)
        rows.append(row_of[seen + pc.list_parent_indices(spans).to_numpy()])
        starts.append(pc.struct_field(flat, "start").to_numpy())
        ends.append(pc.struct_field(flat, "end").to_numpy())
        seen += len(spans)
    row, start, end = (_joined(arrays) for arrays in (rows, starts, ends))
    kept = row >= 0
    return SpanEnds(row[kept], start[kept], end[kept])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays]).astype(np.int64)


def overlap(first: SpanEnds, second: SpanEnds, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters that both and that at least one of two annotators marks: two (rows,) int64 arrays.

    A sweep over the spans' ends, whatever the length of the texts. Spans of one annotator may lie
    over each other.
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

    All (rows,); float32 from 0 to 2. Where neither marks anything the annotators agree. NaN where
    they are not comparable: one of them did not judge.
    """
    apart = 1 - np.divide(both, either, out=np.ones(len(both)), where=either > 0)
    return np.where(comparable, apart + types_differ, np.nan).astype(np.float32)
