"""All responses of a block at once: texts checked, tokens assigned to segments, tokens routed.

routed.py calls `aligned` and `route_responses`. Tokens and segments are flat arrays over all rows,
with offsets to find a row, so each step is a few array operations. They do what `ByteTable` does
for one response; only texts with invalid UTF-8 pass through it row by row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.errors import RowFault
from ..schemas.labels import Route, SpanKind
from .align import ByteTable
from .route import Routing, apply_rule, label_tokens
from .rule_inputs import Block, NamedSegments, Response, token_cap
from .rules import FLAT, SCORED
from .token_scores import TokenScores


@dataclass(frozen=True)
class Ragged:
    """Lists of several rows: values, all entries one row after another; offsets: (rows + 1,)
    int64.
    """

    values: Any
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def owners(self) -> np.ndarray:
        """(values,) int64: the row of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)


def ragged(column: Any) -> Ragged:
    """An Arrow list column; values are an Arrow array. A single chunk is not copied."""
    lists = one_chunk(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return Ragged(lists.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0])


def one_chunk(column: Any) -> Any:
    """A chunked Arrow column as one array; an array unchanged."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def to_numpy(column: Any) -> np.ndarray:
    """A column of numbers or booleans; null is NaN or None."""
    return one_chunk(column).to_numpy(zero_copy_only=False)


def binaries_of(joined: np.ndarray, offsets: np.ndarray) -> Any:
    """Flat bytes as an Arrow column of byte strings, without a copy of them."""
    buffers: Any = (np.ascontiguousarray(offsets), joined)
    kind, rows = pa.large_binary(), len(offsets) - 1
    return pa.Array.from_buffers(kind, rows, [None, *map(pa.py_buffer, buffers)])


@dataclass(frozen=True)
class Responses:
    """Responses of some rows with their tokens assigned to segments.

    rollouts: the rows; token_ids: flat; segment_offsets: (rows + 1,), where a row's segments begin
    among all; segment_tokens: (segments,), tokens of each; token_segment: (tokens,) int32, index
    among all segments, −1 for none; spans: lists of segment indices within the row, flat; correct:
    (rows,) bool; alpha: `routing.alpha`; scores: of the tokens, None without any.
    """

    rollouts: pa.Table
    token_ids: Ragged
    segment_offsets: np.ndarray
    segment_tokens: np.ndarray
    token_segment: np.ndarray
    spans: Ragged
    correct: np.ndarray
    alpha: float
    scores: TokenScores | None = None

    def block(self, named: NamedSegments) -> Block:
        """What a rule for many responses sees."""
        scores = self.scores
        return Block(
            offsets=self.token_ids.offsets,
            token_segment=self.token_segment,
            segment_tokens=self.segment_tokens,
            named=named,
            room=token_cap(self.alpha, self.token_ids.lengths),
            logprobs=ragged(self.rollouts["logprobs"]).values.to_numpy(),
            entropy=None if scores is None else scores.entropy,
            divergence=None if scores is None else scores.divergence,
        )

    def named_segments(self) -> NamedSegments:
        """The segments that the spans name, row by row, in the annotator's order."""
        named = ragged(self.spans.values)
        rows, spans = self.spans.owners(), named.owners()
        ranks = np.arange(len(rows)) - self.spans.offsets[rows]
        index, row = named.values.to_numpy(), rows[spans]
        there = (index >= 0) & (index < np.diff(self.segment_offsets)[row])
        return NamedSegments(
            segment=(self.segment_offsets[row] + index)[there],
            rank=ranks[spans][there],
            row=row[there],
        )

    def one_by_one(self, rows: np.ndarray) -> Iterator[tuple[slice, Response]]:
        """Each of these rows as a Response, with the slice of its tokens."""
        token_ids = self.token_ids.values.to_numpy()
        logprobs = ragged(self.rollouts["logprobs"]).values.to_numpy()
        spans = self.spans.values.to_pylist()
        rollout_ids = self.rollouts["rollout_id"].to_pylist()
        for row in rows.tolist():
            here = slice(*self.token_ids.offsets[row : row + 2].tolist())
            segment = self.token_segment[here].astype(np.int64)
            first, end = self.spans.offsets[row : row + 2]
            scores = self.scores if self.scores is not None and self.scores.exist[row] else None
            entropy = None if scores is None else scores.entropy
            divergence = None if scores is None else scores.divergence
            yield (
                here,
                Response(
                    rollout_id=rollout_ids[row],
                    token_ids=token_ids[here].astype(np.int64),
                    logprobs=logprobs[here].astype(np.float32),
                    token_segment=np.where(segment >= 0, segment - self.segment_offsets[row], -1),
                    spans=spans[first:end],
                    kind=SpanKind.KEY if self.correct[row] else SpanKind.ERROR,
                    alpha=self.alpha,
                    entropy=None if entropy is None else entropy[here],
                    divergence=None if divergence is None else divergence[here],
                ),
            )


def aligned(
    rollouts: pa.Table,
    annotations: pa.Table | None,
    correct: np.ndarray,
    table: ByteTable,
    alpha: float,
    scores: TokenScores | None = None,
) -> Responses:
    """Assign the tokens of each response to the segments of its annotation.

    rollouts, annotations: the same rollouts row by row; annotations None: no segments, no spans.
    scores: of the same rollouts' tokens.

    Raises:
        InputError: a text that its tokens do not spell, or segments that do not tile it.
    """
    text = _spelled(rollouts, table)
    if annotations is None:
        offsets = np.zeros(len(rollouts) + 1, dtype=np.int64)
        spans = Ragged(pa.array([], pa.list_(pa.int32())), offsets)
        segment, tokens = np.full(len(text.token_ids.values), -1, dtype=np.int32), offsets[:0]
    else:
        bounds = _segment_bounds(rollouts, annotations, text, table)
        offsets, spans = bounds.offsets, _spans(annotations, bounds)
        segment, tokens = _token_segments(text, bounds)
    return Responses(
        rollouts, text.token_ids, offsets, tokens, segment, spans, correct, alpha, scores
    )


def route_responses(responses: Responses, taught: np.ndarray, config: RoutingConfig) -> Routing:
    """Route the tokens of many responses; responses without a teacher are plain GRPO.

    taught: (responses,) bool, whether a response has a teacher.

    Raises:
        InputError: a user's own rule that does not return a span id per token, a response without
            scores under a rule that reads them.
    """
    offsets, lengths = responses.token_ids.offsets, responses.token_ids.lengths
    tokens, segment = responses.segment_tokens, responses.token_segment
    named = responses.named_segments()
    if config.rule in SCORED:
        taught = taught & _scored(responses, taught, config)
    if config.rule in FLAT and taught.any():
        span_id = FLAT[config.rule](responses.block(named))
        if not taught.all():
            span_id[np.repeat(~taught, lengths)] = -1
    else:
        span_id = np.full(len(segment), -1, dtype=np.int16)
        for here, response in responses.one_by_one(np.flatnonzero(taught)):
            span_id[here] = apply_rule(response, config.rule)
    marked = np.zeros(len(tokens) + 1, dtype=bool)  # the last entry is for no segment
    marked[named.segment] = True
    return label_tokens(span_id, marked[segment], responses.correct, offsets, config)


def _scored(responses: Responses, taught: np.ndarray, config: RoutingConfig) -> np.ndarray:
    """(responses,) bool: whether all tokens of a response have scores.

    A response that the rule leaves to GRPO whatever they are needs none.
    """
    if responses.scores is None:  # no response has a teacher or an action, see require_scores
        return np.zeros(len(taught), dtype=bool)
    exist = responses.scores.exist
    actions = np.where(responses.correct, int(config.key), int(config.error))
    lacking = np.flatnonzero(taught & ~exist & (actions != int(Route.GRPO)))
    if len(lacking):
        raise RowFault(
            "the scores do not cover all of its tokens; score a dataset that was converted with "
            "routing.rule=all and an action for its responses",
            "scores",
            responses.rollouts["rollout_id"][int(lacking[0])].as_py(),
        )
    return exist


@dataclass(frozen=True)
class _Spelled:
    """The bytes of the tokens.

    joined: (bytes,) uint8, of all tokens; token_starts: (tokens + 1,) and row_starts: (rows + 1,),
    where each token and each row begins in them; invalid: rows whose bytes are no valid UTF-8.
    """

    token_ids: Ragged
    joined: np.ndarray
    token_starts: np.ndarray
    row_starts: np.ndarray
    invalid: list[int]

    def row(self, row: int) -> list[int]:
        first, end = self.token_ids.offsets[row : row + 2].tolist()
        return self.token_ids.values.slice(first, end - first).to_pylist()


def _spelled(rollouts: pa.Table, table: ByteTable) -> _Spelled:
    token_ids = ragged(rollouts["token_ids"])
    joined, token_starts = table.spelled(token_ids.values.to_numpy())
    row_starts = token_starts[token_ids.offsets]
    texts, rows = one_chunk(rollouts["response"]), binaries_of(joined, row_starts)
    invalid = np.flatnonzero(~to_numpy(pc.equal(rows, texts.cast(rows.type)))).tolist()
    spelled = _Spelled(token_ids, joined, token_starts, row_starts, invalid)
    # The text holds U+FFFD for each invalid byte.
    for row in invalid:
        if table.text(spelled.row(row)) != texts[row].as_py():
            raise RowFault(
                "token_ids do not spell the response under this tokenizer; convert with the policy "
                "that sampled it",
                "rollouts",
                rollouts["rollout_id"][row].as_py(),
            )
    return spelled


def _segment_bounds(
    rollouts: pa.Table, annotations: pa.Table, text: _Spelled, table: ByteTable
) -> Ragged:
    """One past the last byte of each segment, as an index into the bytes of all rows."""
    segments = ragged(annotations["segments"])
    starts, ends = (pc.struct_field(segments.values, name).to_numpy() for name in ("start", "end"))
    _check_tiling(rollouts, segments, starts, ends)
    # A character's byte index is its character index plus the continuation bytes before it.
    continuing = np.flatnonzero((text.joined & 0xC0) == 0x80)
    characters_before = continuing - np.arange(len(continuing))
    row_characters = text.row_starts - np.searchsorted(continuing, text.row_starts)
    rows = segments.owners()
    at = row_characters[rows] + ends
    bounds = at + np.searchsorted(characters_before, at, side="right")
    # The next row may begin with a stray continuation byte.
    bounds = np.minimum(bounds, text.row_starts[rows + 1])
    for row in text.invalid:
        here = slice(*segments.offsets[row : row + 2])
        bounds[here] = text.row_starts[row] + table.char_edges(text.row(row))[ends[here]]
    return Ragged(bounds, segments.offsets)


def _check_tiling(
    rollouts: pa.Table, segments: Ragged, starts: np.ndarray, ends: np.ndarray
) -> None:
    """Raises InputError unless the segments of each row that has any tile its text."""
    lengths = to_numpy(pc.utf8_length(rollouts["response"]))  # in characters
    filled = np.flatnonzero(segments.lengths)
    first, last = segments.offsets[filled], segments.offsets[filled + 1] - 1
    before = np.concatenate(([0], ends[:-1]))
    before[first] = 0
    torn = (starts != before) | (ends < starts)
    torn[last] |= ends[last] != lengths[filled]
    if torn.any():
        row = int(segments.owners()[np.argmax(torn)])
        raise RowFault(
            "the annotation's segments do not tile the response; annotate it again",
            "annotations",
            rollouts["rollout_id"][row].as_py(),
        )


def _token_segments(text: _Spelled, bounds: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Segment of each token, (tokens,) int32, and tokens of each segment, (segments,) int64.

    Indices are among the segments of all rows, −1 for tokens without bytes or segments. The rule is
    that of `ByteTable.token_segments`.
    """
    starts, ends = text.token_starts[:-1], text.token_starts[1:]
    # The first token that begins at or after a bound; the one before may cross the bound.
    after = np.searchsorted(starts, bounds.values)
    across = after - 1
    later = starts[across] + (ends[across] - starts[across] - 1) // 2 >= bounds.values
    after -= later & (after > 0)
    counts = np.diff(after, prepend=0, append=len(starts))
    index = np.append(np.arange(len(after), dtype=np.int32), np.int32(-1))
    segment = np.repeat(index, counts)
    outside = starts == ends
    if not bounds.lengths.all():
        outside |= np.repeat(bounds.lengths == 0, text.token_ids.lengths)
    at = np.flatnonzero(outside)
    taken = segment[at]
    tokens = counts[:-1] - np.bincount(taken[taken >= 0], minlength=len(after))
    segment[at] = -1
    return segment, tokens


def _spans(annotations: pa.Table, segments: Ragged) -> Ragged:
    """Segment indices of each span; a row without segments has no spans."""
    spans = ragged(annotations["spans"])
    named = pc.struct_field(spans.values, "segments")
    kept = np.where(segments.lengths > 0, spans.lengths, 0)
    if (kept == spans.lengths).all():
        return Ragged(named, spans.offsets)
    mask = pa.array(np.repeat(kept > 0, spans.lengths))
    return Ragged(named.filter(mask), np.concatenate(([0], np.cumsum(kept))))
