"""Marks of annotators as arrays, per segment and per unit (token or character), before and after α.

compare.py reads and aligns them, agreement.py counts them. A chunk of rollouts is flat: the
segments (or units) of all its rows concatenated, with offsets per row, so figures over 100,000
rollouts are a few array operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.store import Dataset
from ...schemas.configs import RoutingConfig
from ...schemas.labels import TYPE_LABELS, AnnotationStatus, SpanKind
from ...trace.align import ByteTable
from ...trace.route import route_tokens
from ...trace.rule_inputs import Response, token_cap

STATUSES = list(AnnotationStatus)
TYPES = list(TYPE_LABELS)
KINDS = list(SpanKind)
# `first_error` of a row without an error, and of a row that does not state whether there is one.
NO_ERROR, UNKNOWN = -1, -2

# Without the spans' texts: they are most of a table, and no figure needs them.
_COLUMNS = [
    "rollout_id", "problem_id", "correct", "diagnostic_type", "status", "prompt_tokens",
    "completion_tokens", "cost_usd", "segments.list.element.end",
    *(f"spans.list.element.{name}" for name in ("segments.list.element", "kind", "start", "end")),
]  # fmt: skip


def read_marks(dataset: Dataset) -> pa.Table:
    """An annotations dataset without its texts, which a comparison keeps in memory."""
    parts = []
    for part in dataset.manifest["parts"]:
        with dataset.files.open(f"{dataset.ref}/{part['name']}") as file:
            parts.append(pq.ParquetFile(file).read(columns=_COLUMNS))
    return pa.concat_tables(parts).combine_chunks()


@dataclass(frozen=True)
class Marks:
    """One annotator's annotations of a chunk of rollouts; a row is a rollout.

    status, kind, type: (rows,) index into STATUSES, KINDS (the kind asked for), TYPES; −1 for none.
    segment_offsets: (rows + 1,); segment_ends: (segments,) one past the last character, within the
    response. named_offsets: (rows + 1,); named: (named,) segment within the row, in the annotator's
    order. first_error: (rows,) first character of the first error span, or NO_ERROR or UNKNOWN;
    first_error_end: (rows,).
    """

    status: np.ndarray
    kind: np.ndarray
    type: np.ndarray
    segment_offsets: np.ndarray
    segment_ends: np.ndarray
    named_offsets: np.ndarray
    named: np.ndarray
    first_error: np.ndarray
    first_error_end: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.status)

    @property
    def answered(self) -> np.ndarray:
        """(rows,) bool: the annotator answered, with marks or with none."""
        answers = (AnnotationStatus.OK, AnnotationStatus.EMPTY)
        return np.isin(self.status, [STATUSES.index(status) for status in answers])

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) characters of each response."""
        ends = np.concatenate((self.segment_ends, [0]))
        filled = np.diff(self.segment_offsets) > 0
        return np.where(filled, ends[self.segment_offsets[1:] - 1], 0)

    @cached_property
    def segment_mask(self) -> np.ndarray:
        """(segments,) bool: the marked segments."""
        mask = np.zeros(len(self.segment_ends), dtype=bool)
        row = np.repeat(np.arange(self.rows), np.diff(self.named_offsets))
        mask[self.segment_offsets[row] + self.named] = True
        return mask

    def segments(self, row: int) -> list[tuple[int, int]]:
        ends = self.segment_ends[self.segment_offsets[row] : self.segment_offsets[row + 1]].tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))


def marks_of(table: pa.Table) -> Marks:
    """Arrays of some rows of `read_marks`."""
    segments, spans = _chunk(table["segments"]), _chunk(table["spans"])
    each = spans.flatten()
    owner = pc.list_parent_indices(spans).to_numpy(zero_copy_only=False)
    is_error = _codes(pc.struct_field(each, "kind"), KINDS) == KINDS.index(SpanKind.ERROR)
    named = pc.struct_field(each, "segments")
    counts = np.bincount(owner, pc.list_value_length(named).to_numpy(), minlength=len(table))
    status = _codes(table["status"], STATUSES)
    correct = table["correct"].to_numpy()
    starts, ends = (pc.struct_field(each, n).to_numpy()[is_error] for n in ("start", "end"))
    first, end = np.full(len(table), -1), np.full(len(table), -1)
    last_to_first = np.argsort(-starts, kind="stable")  # the first span of a row is set last
    first[owner[is_error][last_to_first]] = starts[last_to_first]
    end[owner[is_error][last_to_first]] = ends[last_to_first]
    return Marks(
        status=status,
        kind=_asked_kinds(correct, owner, is_error),
        type=_codes(table["diagnostic_type"], TYPES),
        segment_offsets=_offsets(pc.list_value_length(segments).to_numpy()),
        segment_ends=pc.struct_field(segments.flatten(), "end").to_numpy(),
        named_offsets=_offsets(counts),
        named=named.flatten().to_numpy(),
        first_error=np.where(first >= 0, first, _without_error(status, correct)),
        first_error_end=end,
    )


def _asked_kinds(correct: np.ndarray, owner: np.ndarray, is_error: np.ndarray) -> np.ndarray:
    """The kind that each row was searched for: that of its spans, else that of its verdict."""
    key, error = KINDS.index(SpanKind.KEY), KINDS.index(SpanKind.ERROR)
    kinds = np.full(len(correct), -1)
    kinds[np.equal(correct, True)] = key
    kinds[np.equal(correct, False)] = error
    kinds[owner] = np.where(is_error, error, key)
    return kinds


def _without_error(status: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """`first_error` of rows without error spans: a right response has no error, unless the call
    failed; a wrong one has none if the annotator answered so."""
    code = STATUSES.index
    failed = [AnnotationStatus.INVALID, AnnotationStatus.FAILED, AnnotationStatus.SKIPPED]
    right = np.equal(correct, True) & ~np.isin(status, [code(one) for one in failed])
    denied = np.equal(correct, False) & (status == code(AnnotationStatus.EMPTY))
    return np.where(right | denied, NO_ERROR, UNKNOWN)


# --- units ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """The tokens or characters of a chunk. offsets: (rows + 1,); segment: (units,) index into the
    chunk's segments, −1 for a token without bytes."""

    offsets: np.ndarray
    segment: np.ndarray


def character_units(marks: Marks) -> Units:
    starts = np.concatenate(([0], marks.segment_ends[:-1]))
    filled = np.flatnonzero(np.diff(marks.segment_offsets))
    starts[marks.segment_offsets[filled]] = 0
    lengths = marks.segment_ends - starts
    ends = np.concatenate(([0], np.cumsum(lengths)))
    return Units(ends[marks.segment_offsets], np.repeat(np.arange(len(lengths)), lengths))


def token_units(marks: Marks, token_ids: pa.Array, table: ByteTable) -> Units:
    """token_ids: the sampler's own, a list per row."""
    lengths = pc.list_value_length(token_ids).to_numpy()
    segment = np.full(int(lengths.sum()), -1)
    offsets = _offsets(lengths)
    flat = pc.list_flatten(token_ids).to_numpy()
    for row in range(marks.rows):
        first, last = offsets[row], offsets[row + 1]
        if segments := marks.segments(row):
            own = table.token_segments(flat[first:last].tolist(), segments)
            segment[first:last] = np.where(own >= 0, own + marks.segment_offsets[row], -1)
    return Units(offsets, segment)


def unit_mask(marks: Marks, units: Units) -> np.ndarray:
    """(units,) bool: the marked units, before the cap."""
    if not len(marks.segment_mask):
        return np.zeros(len(units.segment), dtype=bool)
    return marks.segment_mask[units.segment] & (units.segment >= 0)


def capped_mask(marks: Marks, units: Units, mask: np.ndarray, alpha: float) -> np.ndarray:
    """(units,) bool: the marked units that stage convert would route under α with rule spans."""
    counts, lengths = row_sums(mask, units.offsets), np.diff(units.offsets)
    config = RoutingConfig(alpha=alpha)
    kept = mask.copy()
    # Marks within the cap are all kept; the rule decides about the others.
    for row in np.flatnonzero(counts > token_cap(alpha, lengths)):
        here = slice(units.offsets[row], units.offsets[row + 1])
        segment = units.segment[here]
        named = marks.named[marks.named_offsets[row] : marks.named_offsets[row + 1]]
        response = Response(
            rollout_id="",
            token_ids=segment,  # rule spans reads only their number
            logprobs=np.zeros(len(segment), dtype=np.float32),
            token_segment=np.where(segment >= 0, segment - marks.segment_offsets[row], -1),
            spans=[named.tolist()],
            kind=SpanKind.KEY,
            alpha=alpha,
        )
        kept[here] = route_tokens(response, config).span_id >= 0
    return kept


def places(values: pa.Array | pa.ChunkedArray, held: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The index of each value among `held`: (values,) int64, −1 for none."""
    found = pc.index_in(values, value_set=held)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)  # type: ignore[arg-type]


def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each row's values in a flat array: (rows,)."""
    totals = np.concatenate(([0], np.cumsum(values)))
    return totals[offsets[1:]] - totals[offsets[:-1]]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def _chunk(column: pa.ChunkedArray) -> pa.ListArray:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined  # type: ignore[return-value]


def _codes(column: pa.Array | pa.ChunkedArray, labels: Sequence[str]) -> np.ndarray:
    return places(column, pa.array([str(label) for label in labels]))
