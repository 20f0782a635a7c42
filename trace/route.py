"""Marked segments to token routes: the α cap and the corner (METHOD.md, steps 4 to 6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..schemas.configs import RoutingConfig
from ..schemas.labels import Route, SpanKind


@dataclass(frozen=True)
class Routing:
    """Per-token labels of one response.

    route: (tokens,) uint8; span_id: (tokens,) int16, the rank of the token's span or −1;
    coverage: share of tokens inside kept spans; dropped_tokens: marked tokens that the cap drops.
    """

    route: np.ndarray
    span_id: np.ndarray
    coverage: float
    dropped_tokens: int


def route_tokens(
    token_segment: np.ndarray,
    spans: Sequence[Sequence[int]],
    kind: SpanKind,
    config: RoutingConfig,
) -> Routing:
    """Route the tokens of one response.

    token_segment: (tokens,) segment index per token, −1 for none; spans: segment indices of each
    span, in the annotator's order. Whole segments are kept in that order until the next one would
    exceed ⌊α · tokens⌋; a first segment that alone exceeds it is cut to it.
    """
    tokens = len(token_segment)
    cap = math.floor(config.alpha * tokens + 1e-9)
    span_id = np.full(tokens, -1, dtype=np.int16)
    marked = np.isin(token_segment, [segment for span in spans for segment in span])
    kept = 0
    full = False
    for rank, span in enumerate(spans):
        for segment in span:
            (positions,) = np.nonzero((token_segment == segment) & (span_id < 0))
            room = cap - kept
            if len(positions) > room or full:
                full = True
                if kept > 0:
                    continue
                positions = positions[:room]
            span_id[positions] = rank
            kept += len(positions)
    action = config.key if kind is SpanKind.KEY else config.error
    route = np.where(span_id >= 0, int(action.route), int(Route.GRPO)).astype(np.uint8)
    dropped = int(marked.sum()) - kept
    return Routing(route, span_id, kept / tokens if tokens else 0.0, dropped)
