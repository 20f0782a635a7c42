"""One response's tokens to their routes: a rule's choice and the corner (METHOD.md, steps 4 to 6)."""

from dataclasses import dataclass

import numpy as np

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route, SpanKind
from .rules import Response, load_rule


@dataclass(frozen=True)
class Routing:
    """Per-token labels of one response.

    route: (tokens,) uint8; span_id: (tokens,) int16, the rank of the token's span or −1;
    coverage: share of tokens with a span; dropped_tokens: tokens that the annotator marked and the
    rule left out, under rule spans those beyond the α cap.
    """

    route: np.ndarray
    span_id: np.ndarray
    coverage: float
    dropped_tokens: int


def route_tokens(response: Response, config: RoutingConfig) -> Routing:
    """Route the tokens of one response by the config's rule and by whether it is correct.

    Raises:
        InputError: a rule of the user's own that gives no span id per token.
    """
    span_id = _checked(load_rule(config.rule)(response), response.tokens, config.rule)
    action = config.key if response.kind is SpanKind.KEY else config.error
    return _routing(response, span_id, int(action.route))


def unrouted(response: Response) -> Routing:
    """The response as plain GRPO."""
    return _routing(response, np.full(response.tokens, -1, dtype=np.int16), int(Route.GRPO))


def _routing(response: Response, span_id: np.ndarray, action: int) -> Routing:
    inside = span_id >= 0
    route = np.where(inside, action, int(Route.GRPO)).astype(np.uint8)
    coverage = float(inside.mean()) if len(inside) else 0.0
    return Routing(route, span_id, coverage, int((response.marked & ~inside).sum()))


def _checked(span_id: np.ndarray, tokens: int, rule: str) -> np.ndarray:
    array = np.asarray(span_id)
    highest = np.iinfo(np.int16).max
    if array.shape != (tokens,) or array.dtype.kind != "i" or (array > highest).any():
        raise InputError(
            f"routing.rule {rule!r}: gave {array.dtype} of shape {array.shape} for {tokens} tokens; "
            f"return one integer per token, its span's rank (at most {highest}) or −1"
        )
    return array.astype(np.int16)
