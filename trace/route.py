"""Routes: which tokens of a response leave plain GRPO. A rule is one function.

responses.py calls `within_cap` and `label_tokens` for the responses of a part; `trace-opd compare`
calls `route_tokens` for one. `routing.rule` names one of RULES, or `file.py:function` or
`module:function` of your own (schemas/own_code.py):

    # my_rules.py
    import numpy as np

    def surprising(response):
        '''Route the ⌊α n⌋ tokens that the policy found least likely.'''
        span_id = np.full(response.tokens, -1)
        span_id[np.argsort(response.logprobs, kind="stable")[: response.room]] = 0
        return span_id

`routing.key` and `routing.error`, not the rule, choose the loss of the routed tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..schemas import own_code
from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route, SpanKind, TeacherContext


def token_cap(alpha: float, tokens: Any) -> Any:
    """⌊α · tokens⌋, of a number or of an array: the coverage cap (METHOD.md, step 4).

    The 1e-9 keeps floating-point products such as 0.29 · 100 = 28.999… from losing a token.
    """
    return np.floor(alpha * tokens + 1e-9).astype(np.int64)


@dataclass(frozen=True)
class Response:
    """What a rule sees of one response.

    token_ids: (tokens,) int64; logprobs: (tokens,) float32, nats, under the sampling policy;
    token_segment: (tokens,) segment of each token, −1 for none; spans: segment indices of each
    span, in the annotator's order; kind: KEY if the response is correct, else ERROR;
    alpha: `routing.alpha`.
    """

    rollout_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    token_segment: np.ndarray
    spans: Sequence[Sequence[int]]
    kind: SpanKind
    alpha: float

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def room(self) -> int:
        """⌊α · tokens⌋: the most tokens that the coverage cap allows."""
        return int(token_cap(self.alpha, self.tokens))

    @property
    def marked(self) -> np.ndarray:
        """(tokens,) bool: inside the annotator's spans, before the cap."""
        return np.isin(self.token_segment, [segment for span in self.spans for segment in span])

    def generator(self) -> np.random.Generator:
        """A generator seeded by the rollout id, so that a repeated run draws the same tokens."""
        return np.random.default_rng(list(self.rollout_id.encode()))


@dataclass(frozen=True)
class NamedSegments:
    """The segments that spans name, row by row, within a row in the annotator's order.

    segment: (named,) index; rank: (named,) of the span that names it; row: (named,).
    """

    segment: np.ndarray
    rank: np.ndarray
    row: np.ndarray


_WHERE = "routing.rule"

# Returns (tokens,) integers: the rank of the span that a token belongs to, −1: not routed.
Rule = Callable[[Response], np.ndarray]


def spans(response: Response) -> np.ndarray:
    """The annotator's spans under the cap (METHOD.md, step 4).

    Takes full segments in the annotator's order until the next one would exceed the cap; a first
    segment that alone exceeds the cap is cut to it.
    """
    named = [(segment, rank) for rank, span in enumerate(response.spans) for segment in span]
    segment, rank = np.array(named, dtype=np.int64).reshape(-1, 2).T
    count = max(response.token_segment.max(initial=-1), segment.max(initial=-1)) + 1
    segments = NamedSegments(segment, rank, np.zeros_like(rank))
    tokens = np.bincount(response.token_segment + 1, minlength=int(count) + 1)[1:]
    return within_cap(response.token_segment, tokens, segments, np.array([response.room]))


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


def every_token(response: Response) -> np.ndarray:
    """All tokens regardless of the cap: plain self-distillation."""
    return np.zeros(response.tokens, dtype=np.int16)


def random_tokens(response: Response) -> np.ndarray:
    """As many tokens as the cap allows, drawn from all tokens."""
    return _drawn(response, np.arange(response.tokens))


def inverted(response: Response) -> np.ndarray:
    """As many tokens as the cap allows, drawn from outside the annotator's spans."""
    return _drawn(response, np.flatnonzero(~response.marked))


RULES: dict[str, Rule] = {
    "spans": spans,
    "all": every_token,
    "random": random_tokens,
    "inverted": inverted,
}


def load_rule(name: str) -> Rule:
    """The rule of that name: one of RULES, or `file.py:function` or `module:function`, imported.

    Raises:
        InputError: no such rule, a file that cannot be imported, or nothing there to call.
    """
    if name in RULES:
        return RULES[name]
    if not own_code.is_own(name):
        raise InputError(
            f"routing.rule {name!r}: is none of {', '.join(RULES)}; name one of them, or "
            "file.py:function or module:function of your own"
        )
    return cast(Rule, own_code.loaded(name, _WHERE).value)


def rule_source(name: str) -> str | None:
    """Source text of the file of a user's own rule; None for one of RULES.

    Dataset ids hash it, because a rule's name does not determine what it routes. The rule is loaded
    again if the file has changed.
    """
    if name in RULES:
        return None
    load_rule(name)
    file = own_code.load(name, _WHERE).file
    return file.read_text() if file is not None else ""


def require_rule(name: str, source_hash: str | None, hash_of: Callable[[str], str]) -> None:
    """Raises InputError if a user's own rule is not the one that a run began with.

    A worker may outlive runs and hold an earlier one; source_hash: None for one of RULES.
    """
    if source_hash is not None and hash_of(rule_source(name) or "") != source_hash:
        raise InputError(
            f"routing.rule {name!r}: the file has changed since this run began; give the same "
            "command again, which makes another dataset"
        )


def needs_annotations(config: RoutingConfig) -> bool:
    """Whether routing needs annotations: their spans, their type label or their reflection."""
    if config.key is Route.GRPO and config.error is Route.GRPO:
        return False
    written = (TeacherContext.TYPE, TeacherContext.REFLECTION)
    read = config.teacher_context in written or config.contrast_context in written
    return read or config.rule not in ("all", "random")


def _drawn(response: Response, candidates: np.ndarray) -> np.ndarray:
    """At most `room` of the candidates, without replacement, as span 0."""
    span_id = np.full(response.tokens, -1, dtype=np.int16)
    count = min(response.room, len(candidates))
    span_id[response.generator().choice(candidates, count, replace=False)] = 0
    return span_id


@dataclass(frozen=True)
class Routing:
    """Labels of the tokens of one response, or of several one after another.

    route: (tokens,) uint8; span_id: (tokens,) int16, the rank of the token's span or −1;
    coverage: share of a response's tokens with a span; dropped_tokens: tokens that the annotator
    marked and the rule left out, under rule `spans` those beyond the α cap. The latter two are
    numbers for one response, (responses,) float64 and int64 for several.
    """

    route: np.ndarray
    span_id: np.ndarray
    coverage: Any
    dropped_tokens: Any


def route_tokens(response: Response, config: RoutingConfig) -> Routing:
    """Route the tokens of one response by the config's rule and by whether it is correct.

    Raises:
        InputError: a user's own rule that does not return a span id per token.
    """
    span_id = apply_rule(response, config.rule)
    correct, offsets = np.array([response.kind is SpanKind.KEY]), np.array([0, response.tokens])
    routing = label_tokens(span_id, response.marked, correct, offsets, config)
    coverage, dropped = routing.coverage.item(), routing.dropped_tokens.item()
    return Routing(routing.route, routing.span_id, coverage, dropped)


def apply_rule(response: Response, rule: str) -> np.ndarray:
    """The span ids of a rule, (tokens,) int16.

    Raises:
        InputError: a user's own rule that does not return a span id per token.
    """
    function = load_rule(rule)
    if rule in RULES:
        span_id = np.asarray(function(response))
    else:
        with own_code.running(own_code.loaded(rule, _WHERE)):
            span_id = np.asarray(function(response))
    tokens, highest = response.tokens, np.iinfo(np.int16).max
    if span_id.shape != (tokens,) or span_id.dtype.kind != "i" or (span_id > highest).any():
        raise InputError(
            f"routing.rule {rule!r}: returned {span_id.dtype} of shape {span_id.shape} for "
            f"{tokens} "
            f"tokens; return one integer per token, its span's rank (at most {highest}) or −1"
        )
    return span_id.astype(np.int16)


def label_tokens(
    span_id: np.ndarray,
    marked: np.ndarray,
    correct: np.ndarray,
    offsets: np.ndarray,
    config: RoutingConfig,
) -> Routing:
    """The routing of responses one after another.

    span_id: (tokens,) from a rule; marked: (tokens,) bool, inside the annotator's spans; correct:
    (responses,) bool; offsets: (responses + 1,), where each response begins among the tokens.
    """
    actions = np.where(correct, int(config.key), int(config.error)).astype(np.uint8)
    inside = span_id >= 0
    lengths = np.diff(offsets)
    return Routing(
        route=np.where(inside, np.repeat(actions, lengths), np.uint8(Route.GRPO)),
        span_id=span_id,
        coverage=_row_counts(inside, offsets) / np.maximum(lengths, 1),
        dropped_tokens=_row_counts(marked & ~inside, offsets),
    )


def _row_counts(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(rows,) int64: how many entries of each row are true."""
    return np.diff(np.searchsorted(np.flatnonzero(mask), offsets))
