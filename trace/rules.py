"""Rules: which tokens of a response are routed, each one function.

A rule of RULES sees one response, `Response` (rule_inputs.py), as a rule of your own does. Those in
FLAT see many responses at once, `Block`: a few array operations for a part. responses.py calls
them, route.py calls RULES and the user's own.
"""

from collections.abc import Callable
from functools import wraps

import numpy as np

from .rule_inputs import Block, NamedSegments, Response, block_of

# Both return (tokens,) integers: the rank of the span that a token belongs to, −1: not routed.
Rule = Callable[[Response], np.ndarray]
FlatRule = Callable[[Block], np.ndarray]

FLAT: dict[str, FlatRule] = {}


def _flat(rule: FlatRule) -> Rule:
    """Enter a rule for blocks into FLAT, under its function's name; return it for one response."""
    FLAT[rule.__name__] = rule

    @wraps(rule)
    def alone(response: Response) -> np.ndarray:
        return rule(block_of(response))

    return alone


@_flat
def spans(block: Block) -> np.ndarray:
    """The annotator's spans under the cap (METHOD.md, step 4).

    Takes full segments in the annotator's order until the next one would exceed the cap; a first
    segment that alone exceeds the cap is cut to it.
    """
    return within_cap(block.token_segment, block.segment_tokens, block.named, block.room)


@_flat
def first_span(block: Block) -> np.ndarray:
    """The earliest marked segment of the response alone, cut to the cap."""
    first = _earliest(block)
    return within_cap(block.token_segment, block.segment_tokens, first, block.room)


@_flat
def from_first_span(block: Block) -> np.ndarray:
    """All from the first token of the earliest marked segment to the end, regardless of the cap."""
    first = _earliest(block)
    at = np.flatnonzero(block.token_segment >= 0)[::-1]
    begins = np.zeros(len(block.segment_tokens), dtype=np.int64)
    begins[block.token_segment[at]] = at  # the first token of a segment is set last
    begin, rank = block.offsets[1:].copy(), np.zeros(len(block.room), dtype=np.int16)
    begin[first.row] = begins[first.segment]
    rank[first.row] = first.rank
    inside = block.places >= np.repeat(begin - block.offsets[:-1], block.lengths)
    return np.where(inside, np.repeat(rank, block.lengths), np.int16(-1))


@_flat
def every_token(block: Block) -> np.ndarray:
    """All tokens regardless of the cap: plain self-distillation."""
    return np.zeros(len(block.token_segment), dtype=np.int16)


@_flat
def prefix(block: Block) -> np.ndarray:
    """The first ⌊α n⌋ tokens."""
    return _as_span(block.places < np.repeat(block.room, block.lengths))


@_flat
def surprise(block: Block) -> np.ndarray:
    """The ⌊α n⌋ tokens that the policy found least likely."""
    return _highest(-block.logprobs, block)


@_flat
def entropy(block: Block) -> np.ndarray:
    """The ⌊α n⌋ tokens before which the student's entropy is highest."""
    assert block.entropy is not None, "see require_scores"
    return _highest(block.entropy, block)


@_flat
def importance(block: Block) -> np.ndarray:
    """The ⌊α n⌋ tokens of highest 1 − (1 − h)(1 − d) (TIP, arXiv 2604.14084, eq. 7 and 8).

    h: the student's entropy, clipped at its 98th percentile and scaled from its least to its
    largest value to 0 … 1; d: the divergence KL(student‖teacher), scaled alike without a clip.
    TIP takes percentile and extremes over a batch; here they are the response's own (our choice),
    so that a token's route depends on no other response. A constant scales to 0.
    """
    assert block.entropy is not None, "see require_scores"
    assert block.divergence is not None, "see require_scores"
    if not len(block.entropy):
        return _as_span(np.zeros(0, dtype=bool))
    top = _quantiles(block.entropy.astype(np.float64), block, 0.98)
    h = _scaled(np.minimum(block.entropy, np.repeat(top, block.lengths)), block)
    d = _scaled(block.divergence.astype(np.float64), block)
    return _highest(1 - (1 - h) * (1 - d), block)


def random_tokens(response: Response) -> np.ndarray:
    """As many tokens as the cap allows, drawn from all tokens."""
    return _drawn(response, np.arange(response.tokens))


def inverted(response: Response) -> np.ndarray:
    """As many tokens as the cap allows, drawn from outside the annotator's spans."""
    return _drawn(response, np.flatnonzero(~response.marked))


RULES: dict[str, Rule] = {
    "spans": spans,
    "first_span": first_span,
    "from_first_span": from_first_span,
    "prefix": prefix,
    "surprise": surprise,
    "entropy": entropy,
    "importance": importance,
    "all": every_token,
    "random": random_tokens,
    "inverted": inverted,
}
FLAT["all"] = FLAT.pop("every_token")

# What a rule reads of a scores table.
SCORED = {"entropy": ("student_entropy",), "importance": ("student_entropy", "divergence")}
# Rules that read no annotation.
UNANNOTATED = ("all", "random", "prefix", "surprise", *SCORED)


def within_cap(
    token_segment: np.ndarray, tokens: np.ndarray, named: NamedSegments, room: np.ndarray
) -> np.ndarray:
    """Rule `spans` for many responses, flat: (tokens,) int16.

    token_segment: (tokens,) index into the segments of all rows, −1 for none; tokens: (segments,)
    tokens of each; named: indices into them; room: (rows,) `token_cap` of each row.
    """
    first = np.sort(np.unique(named.segment, return_index=True)[1])  # repeated names count once
    segment, rank, row = named.segment[first], named.rank[first], named.row[first]
    room = room[row]
    total = np.cumsum(tokens[segment])
    before = total - tokens[segment]
    used = total - before[np.searchsorted(row, row)]  # within the row, this segment included
    # Sums grow along a row, so nothing fits after the first segment that does not.
    fits, cut = used <= room, (used > room) & (used == tokens[segment])
    rank_of = np.full(len(tokens) + 1, -1, dtype=np.int16)  # the last entry is for no segment
    rank_of[segment[fits | cut]] = rank[fits | cut]
    span_id = rank_of[token_segment]
    if cut.any():
        room_of = np.full(len(tokens) + 1, -1)
        room_of[segment[cut]] = room[cut]
        at = np.flatnonzero(room_of[token_segment] >= 0)
        at = at[np.argsort(token_segment[at], kind="stable")]
        own = token_segment[at]
        place = np.arange(len(at)) - np.searchsorted(own, own)  # within its segment
        span_id[at[place >= room_of[own]]] = -1
    return span_id


def _earliest(block: Block) -> NamedSegments:
    """Of each row with marks the first marked segment that has tokens."""
    named = block.named
    filled = block.segment_tokens[named.segment] > 0
    segment, rank, row = (x[filled] for x in (named.segment, named.rank, named.row))
    order = np.lexsort((np.arange(len(segment)), segment, row))
    first = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
    return NamedSegments(segment[first], rank[first], row[first])


def _highest(values: np.ndarray, block: Block) -> np.ndarray:
    """The ⌊α n⌋ highest of each response's values as span 0, of equal ones the earlier."""
    chosen = np.zeros(len(values), dtype=bool)
    begins, rooms = block.offsets.tolist(), block.room.tolist()
    # Row by row: one sort of all rows at once takes several times as long.
    for begin, end, room in zip(begins, begins[1:], rooms, strict=False):
        chosen[begin + np.argsort(-values[begin:end], kind="stable")[:room]] = True
    return _as_span(chosen)


def _quantiles(values: np.ndarray, block: Block, share: float) -> np.ndarray:
    """(rows,) a quantile of each response's values, interpolated linearly."""
    rows = np.repeat(np.arange(len(block.room)), block.lengths)
    ordered = values[np.lexsort((values, rows))]
    at = share * (block.lengths - 1)
    below = block.offsets[:-1] + np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, block.offsets[1:] - 1)
    return ordered[below] + (at - np.floor(at)) * (ordered[above] - ordered[below])


def _scaled(values: np.ndarray, block: Block) -> np.ndarray:
    """(values − least) / (largest − least) within each response; 0 where all are equal."""
    least, most = (f.reduceat(values, block.offsets[:-1]) for f in (np.minimum, np.maximum))
    width = np.repeat(most - least, block.lengths)
    above = values - np.repeat(least, block.lengths)
    return np.divide(above, width, out=np.zeros_like(above), where=width > 0)


def _as_span(chosen: np.ndarray) -> np.ndarray:
    """A mask as span 0."""
    return np.where(chosen, np.int16(0), np.int16(-1))


def _drawn(response: Response, candidates: np.ndarray) -> np.ndarray:
    """At most `room` of the candidates, without replacement, as span 0."""
    span_id = np.full(response.tokens, -1, dtype=np.int16)
    count = min(response.room, len(candidates))
    span_id[response.generator().choice(candidates, count, replace=False)] = 0
    return span_id
