"""Cuts a response into pieces, each with the paint of its route.

rollout_view.py paints the rollouts that the page and the terminal draw. With the policy's tokenizer
the paint is exact per token. Without it, it is an estimate: under rule spans a span that the α cap
cut is painted up to its share of kept tokens, under other rules all tokens count as equally long.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...schemas.labels import Route
from ...trace.align import ByteTable
from ..terminal import visible


class Paint(IntEnum):
    """What a character's background shows; a route has the number and the name of its paint.

    PLAIN: the ordinary loss, unmarked. A member per other route, by its name: routed there, inside
    a span or not. MARKED: marked by the annotator, and nothing is routed yet or the action is none.
    DROPPED: marked, and left out by the rule (under rule spans by the α cap).
    """

    _ignore_ = "route"
    PLAIN = 0
    for route in Route:
        if route is not Route.GRPO:
            vars()[route.name] = route.value
    MARKED = len(Route)
    DROPPED = len(Route) + 1


class Piece(NamedTuple):
    """A run of characters with one paint. span: rank of the annotator's span, −1 outside;
    segment: index of the segment that begins with this piece, else None."""

    text: str
    paint: Paint
    span: int
    segment: int | None


@dataclass(frozen=True)
class CharPaint:
    """paint: (characters,) uint8 of Paint; span: (characters,) int16, rank of the span or −1."""

    paint: np.ndarray
    span: np.ndarray


def paint_spans(length: int, spans: Sequence[dict]) -> CharPaint:
    """Paint of a response of `length` characters that is annotated but not routed."""
    painted = _blank(length)
    for span in _least_important_first(spans):
        painted.paint[span["start"] : span["end"]] = Paint.MARKED
        painted.span[span["start"] : span["end"]] = span["rank"]
    return painted


def paint_tokens(
    table: ByteTable,
    length: int,
    segments: Sequence[dict],
    spans: Sequence[dict],
    token_ids: Sequence[int],
    route: np.ndarray,
    span_id: np.ndarray,
) -> CharPaint:
    """Exact paint of a routed response: each token's characters get the token's route.

    token_ids: as long as route and span_id, which are (tokens,) as in the routed table.
    """
    # The last entry is for tokens without bytes, whose segment is −1.
    marked = np.full(len(segments) + 1, -1, dtype=np.int16)
    for span in _least_important_first(spans):
        marked[span["segments"]] = span["rank"]
    bounds = [(segment["start"], segment["end"]) for segment in segments]
    rank = marked[table.token_segments(token_ids, bounds)]
    paint = _routed_paint(route, span_id, rank)
    painted = _blank(length)
    starts, ends = table.char_ranges(token_ids)
    for first, last in _runs(paint, rank):
        painted.paint[starts[first] : ends[last - 1]] = paint[first]
        painted.span[starts[first] : ends[last - 1]] = rank[first]
    return painted


def paint_even_tokens(
    length: int, spans: Sequence[dict], route: np.ndarray, span_id: np.ndarray
) -> CharPaint:
    """Paint of a routed response without its tokenizer, as if all tokens were equally long."""
    span = paint_spans(length, spans).span
    token = np.arange(length) * len(route) // max(length, 1)
    return CharPaint(_routed_paint(route[token], span_id[token], span), span)


def paint_kept_spans(
    length: int,
    segments: Sequence[dict],
    spans: Sequence[dict],
    route: np.ndarray,
    span_id: np.ndarray,
    dropped_tokens: int,
) -> CharPaint:
    """Paint of a response routed by rule spans, without its tokenizer: spans up to their cut."""
    painted = _blank(length)
    ends = _kept_ends(segments, spans, span_id, dropped_tokens)
    for span in _least_important_first(spans):
        start, kept_end = span["start"], ends.get(span["rank"], span["start"])
        painted.span[start : span["end"]] = span["rank"]
        painted.paint[kept_end : span["end"]] = Paint.DROPPED
        if kept_end > start:
            kept = span_id == span["rank"]
            painted.paint[start:kept_end] = _routed_paint(
                route[kept], span_id[kept], span_id[kept]
            )[0]
    return painted


def _kept_ends(
    segments: Sequence[dict], spans: Sequence[dict], span_id: np.ndarray, dropped_tokens: int
) -> dict[int, int]:
    """One past the last kept character of each kept span, by rank.

    The cap fills spans in order of rank, so only the last kept span can be cut. Where it is cut
    follows from its kept tokens and the tokens per character of all marks from it on. The cap keeps
    entire segments, except for a first segment that alone exceeds it.
    """
    kept = [span for span in spans if (span_id == span["rank"]).any()]
    ends = {span["rank"]: span["end"] for span in kept}
    if not kept or dropped_tokens == 0:
        return ends
    last = kept[-1]
    tokens = int(np.count_nonzero(span_id == last["rank"]))
    marked_chars = sum(s["end"] - s["start"] for s in spans if s["rank"] >= last["rank"])
    estimate = last["start"] + round(tokens * marked_chars / (tokens + dropped_tokens))
    boundaries = [segments[index]["end"] for index in last["segments"]]
    if len(kept) == 1 and estimate < boundaries[0]:
        ends[last["rank"]] = max(estimate, last["start"] + 1)
    else:
        ends[last["rank"]] = min(boundaries, key=lambda end: abs(end - estimate))
    return ends


def pieces(text: str, segments: Sequence[dict], painted: CharPaint) -> list[Piece]:
    """Cut a text where its paint, its span or its segment changes; texts are made `visible`."""
    return [
        Piece(shown, Paint(paint), span, segment)
        for shown, paint, span, segment in cut(text, segments, painted)
    ]


def cut(
    text: str, segments: Sequence[dict], painted: CharPaint
) -> Iterator[tuple[str, int, int, int | None]]:
    """Per run: (visible text, paint, span, index of the segment that begins here or None)."""
    starts = {segment["start"]: index for index, segment in enumerate(segments)}
    edges = {first for first, _ in _runs(painted.paint, painted.span)} | set(starts)
    for a, b in pairwise(sorted(edges | {len(text)})):
        yield visible(text[a:b]), int(painted.paint[a]), int(painted.span[a]), starts.get(a)


def _blank(length: int) -> CharPaint:
    return CharPaint(np.zeros(length, dtype=np.uint8), np.full(length, -1, dtype=np.int16))


def _least_important_first(spans: Sequence[dict]) -> list[dict]:
    """Where spans share a segment, the more important one is painted last."""
    return sorted(spans, key=lambda span: -span["rank"])


def _routed_paint(route: np.ndarray, span_id: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Paint of a routed response, uint8; rank: the annotator's span at each place, −1 outside."""
    marked = np.where(span_id >= 0, Paint.MARKED, Paint.DROPPED)
    paint = np.where(rank >= 0, marked, Paint.PLAIN)
    return np.where(route == Route.GRPO, paint, route).astype(np.uint8)


def _runs(*arrays: np.ndarray) -> list[tuple[int, int]]:
    """(first, one past the last) of each run in which none of the equally long arrays changes."""
    length = len(arrays[0])
    if not length:
        return []
    changes = np.zeros(length, dtype=bool)
    changes[0] = True
    for array in arrays:
        changes[1:] |= array[1:] != array[:-1]
    starts = np.flatnonzero(changes).tolist()
    return list(zip(starts, [*starts[1:], length], strict=True))
