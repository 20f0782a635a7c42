"""Tokens to their routes: a rule's choice and the corner (METHOD.md, steps 4 to 6)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route, SpanKind
from .ragged import row_counts
from .responses import Responses
from .rules import Response, load_rule, token_cap, within_cap


@dataclass(frozen=True)
class Routing:
    """Labels of the tokens of one response, or of several behind one another.

    route: (tokens,) uint8; span_id: (tokens,) int16, the rank of the token's span or −1;
    coverage: share of a response's tokens with a span; dropped_tokens: tokens that the annotator
    marked and the rule left out, under rule spans those beyond the α cap. Both are a number for one
    response, (responses,) float64 and int64 for several.
    """

    route: np.ndarray
    span_id: np.ndarray
    coverage: Any
    dropped_tokens: Any


def route_tokens(response: Response, config: RoutingConfig) -> Routing:
    """Route the tokens of one response by the config's rule and by whether it is correct.

    Raises:
        InputError: a rule of the user's own that gives no span id per token.
    """
    span_id = _chosen(response, config.rule)
    offsets = np.array([0, response.tokens])
    actions = _actions(np.array([response.kind is SpanKind.KEY]), config)
    routing = _routing(span_id, response.marked, actions, offsets)
    coverage, dropped = routing.coverage.item(), routing.dropped_tokens.item()
    return Routing(routing.route, routing.span_id, coverage, dropped)


def route_responses(responses: Responses, taught: np.ndarray, config: RoutingConfig) -> Routing:
    """Route the tokens of many responses; those without a teacher are plain GRPO.

    taught: (responses,) bool.

    Raises:
        InputError: a rule of the user's own that gives no span id per token.
    """
    offsets, lengths = responses.token_ids.offsets, responses.token_ids.lengths
    tokens, segment = responses.segment_tokens, responses.token_segment
    named = responses.named_segments()
    if config.rule == "spans":
        span_id = within_cap(segment, tokens, named, token_cap(config.alpha, lengths))
        if not taught.all():
            span_id[np.repeat(~taught, lengths)] = -1
    else:
        span_id = np.full(len(segment), -1, dtype=np.int16)
        for here, response in responses.one_by_one(np.flatnonzero(taught)):
            span_id[here] = _chosen(response, config.rule)
    marked = np.zeros(len(tokens) + 1, dtype=bool)  # the last stands for no segment
    marked[named.segment] = True
    return _routing(span_id, marked[segment], _actions(responses.correct, config), offsets)


def _chosen(response: Response, rule: str) -> np.ndarray:
    span_id = np.asarray(load_rule(rule)(response))
    tokens, highest = response.tokens, np.iinfo(np.int16).max
    if span_id.shape != (tokens,) or span_id.dtype.kind != "i" or (span_id > highest).any():
        raise InputError(
            f"routing.rule {rule!r}: gave {span_id.dtype} of shape {span_id.shape} for {tokens} "
            f"tokens; return one integer per token, its span's rank (at most {highest}) or −1"
        )
    return span_id.astype(np.int16)


def _actions(correct: np.ndarray, config: RoutingConfig) -> np.ndarray:
    """(responses,) uint8: what the routed tokens of each response get."""
    key, error = int(config.key), int(config.error)
    return np.where(correct, key, error).astype(np.uint8)


def _routing(
    span_id: np.ndarray, marked: np.ndarray, actions: np.ndarray, offsets: np.ndarray
) -> Routing:
    inside = span_id >= 0
    lengths = np.diff(offsets)
    return Routing(
        route=np.where(inside, np.repeat(actions, lengths), np.uint8(Route.GRPO)),
        span_id=span_id,
        coverage=row_counts(inside, offsets) / np.maximum(lengths, 1),
        dropped_tokens=row_counts(marked & ~inside, offsets),
    )
