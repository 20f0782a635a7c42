"""Lists of different lengths as one flat array and where each row begins in it.

What is done to every token of a part is then done by a few array operations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..schemas.contract import list_of


@dataclass(frozen=True)
class Ragged:
    """values: the entries of all rows behind one another; offsets: (rows + 1,) int64."""

    values: Any
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def owners(self) -> np.ndarray:
        """(values,) int64: the row of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)


def ragged(column: Any) -> Ragged:
    """An Arrow list column; its values are an Arrow array. Copies nothing of a single chunk."""
    lists = one_chunk(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return Ragged(lists.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0])


def one_chunk(column: Any) -> Any:
    """A chunked Arrow column as one array; an array as it is."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def to_numpy(column: Any) -> np.ndarray:
    """A column of numbers or booleans; null is NaN or None."""
    return one_chunk(column).to_numpy(zero_copy_only=False)


def lists_of(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """Flat values as an Arrow list column, without a copy of them."""
    flat: Any = pa.array(values)
    kind: Any = list_of(flat.type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)


def binaries_of(joined: np.ndarray, offsets: np.ndarray) -> Any:
    """Flat bytes as an Arrow column of byte strings, without a copy of them."""
    buffers: Any = (np.ascontiguousarray(offsets), joined)
    kind, rows = pa.large_binary(), len(offsets) - 1
    return pa.Array.from_buffers(kind, rows, [None, *map(pa.py_buffer, buffers)])


def rows_of(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows, ascending; copies nothing if they are all. Runs are copied as they are, several times
    faster than row by row."""
    if len(rows) == len(table):
        return table
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    if len(breaks) * 2 >= len(rows):
        return table.take(pa.array(rows, pa.int64()))
    runs = zip(rows[np.append(0, breaks)], rows[np.append(breaks, len(rows)) - 1], strict=True)
    return pa.concat_tables(table.slice(a, b - a + 1) for a, b in runs).combine_chunks()


def row_counts(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(rows,) int64: how many entries of each row are true."""
    return np.diff(np.searchsorted(np.flatnonzero(mask), offsets))
