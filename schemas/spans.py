"""Which rows of an annotations table have segments or spans that cannot be right.

tables.py makes them faults of the contract: a table written by hand is refused where it is read.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_fill: Any = pc.fill_null  # its stubs know no plain numbers
_field: Any = pc.struct_field


def torn_segments(table: pa.Table) -> pa.Array:
    """Rows whose segments do not follow each other from character 0, or have a null."""
    segments = _one(table["segments"])
    parents, start, end = _parents(segments), *_bounds(pc.list_flatten(segments))
    before = np.concatenate(([0], end[:-1]))[: len(end)]
    before[np.diff(parents, prepend=-1) != 0] = 0
    return _mask(table, parents, (start != before) | (end < start))


def misplaced_spans(table: pa.Table) -> pa.Array:
    """Rows with a span that names no segment or one that is not there, or with other bounds than
    its segments', or with a null.
    """
    segments, spans = _one(table["segments"]), _one(table["spans"])
    values, parents = pc.list_flatten(spans), _parents(spans)
    bad = np.zeros(len(values), dtype=bool)
    for name in ("segments", "kind", "rank", "start", "end", "text"):
        bad |= pc.is_null(_field(values, name)).to_numpy(zero_copy_only=False)
    named: Any = _field(values, "segments")
    index = _fill(pc.list_flatten(named), -1).to_numpy(zero_copy_only=False)
    owner = _parents(named)
    bad |= np.bincount(owner, minlength=len(values))[: len(values)] == 0
    counts = _fill(pc.list_value_length(segments), 0).to_numpy(zero_copy_only=False)
    outside = (index < 0) | (index >= counts[parents[owner]])
    bad[owner[outside]] = True
    sound = ~bad[owner]
    offsets = np.concatenate(([0], np.cumsum(counts)))
    place, span = (offsets[parents[owner]] + index)[sound], owner[sound]
    start, end = _bounds(pc.list_flatten(segments))
    first, last = np.full(len(values), 2**31), np.full(len(values), -1)
    np.minimum.at(first, span, start[place])
    np.maximum.at(last, span, end[place])
    own_start, own_end = _bounds(values)
    bad |= ~bad & ((own_start != first) | (own_end != last))
    return _mask(table, parents, bad)


def _one(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _parents(lists: Any) -> np.ndarray:
    return pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)


def _bounds(structs: Any) -> tuple[np.ndarray, np.ndarray]:
    """start and end of each, −1 for null."""
    start, end = (
        _fill(_field(structs, name), -1).to_numpy(zero_copy_only=False) for name in ("start", "end")
    )
    return start.astype(np.int64), end.astype(np.int64)


def _mask(table: pa.Table, parents: np.ndarray, bad: np.ndarray) -> pa.Array:
    rows = np.zeros(len(table), dtype=bool)
    rows[parents[bad]] = True
    return pa.array(rows)
