"""Route rules: which tokens of a response leave plain GRPO. A rule is one function.

`routing.rule` names one of RULES, or `module:function` of your own:

    # my_rules.py
    import numpy as np

    def surprising(response):
        '''Route the ⌊α n⌋ tokens that the policy found least likely.'''
        span_id = np.full(response.tokens, -1)
        span_id[np.argsort(response.logprobs, kind="stable")[: response.room]] = 0
        return span_id

What the routed tokens get is not a rule's to say: it is `routing.key` or `routing.error`.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Action, SpanKind


@dataclass(frozen=True)
class Response:
    """What a rule may see of one response.

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
        """⌊α · tokens⌋: how many tokens the coverage cap lets through."""
        return math.floor(self.alpha * self.tokens + 1e-9)

    @property
    def marked(self) -> np.ndarray:
        """(tokens,) bool: inside the annotator's spans, before the cap."""
        return np.isin(self.token_segment, [segment for span in self.spans for segment in span])

    def generator(self) -> np.random.Generator:
        """Random numbers that are the same whenever this response is routed."""
        return np.random.default_rng(list(self.rollout_id.encode()))


@dataclass(frozen=True)
class Marked:
    """The segments that spans name, row by row, in the annotator's order within a row.

    segment: (marked,) index; rank: (marked,) of the span that names it; row: (marked,).
    """

    segment: np.ndarray
    rank: np.ndarray
    row: np.ndarray


# Returns (tokens,) integers: the rank of the span that a token is routed for, −1: not routed.
Rule = Callable[[Response], np.ndarray]


def spans(response: Response) -> np.ndarray:
    """The annotator's spans (METHOD.md, step 4): whole segments in its order until the next one
    would exceed the cap; a first segment that alone exceeds it is cut to it."""
    named = [(segment, rank) for rank, span in enumerate(response.spans) for segment in span]
    segment, rank = np.array(named, dtype=np.int64).reshape(-1, 2).T
    count = max(response.token_segment.max(initial=-1), segment.max(initial=-1)) + 1
    marked = Marked(segment, rank, np.zeros_like(rank))
    tokens = np.bincount(response.token_segment + 1, minlength=int(count) + 1)[1:]
    return within_cap(response.token_segment, tokens, marked, np.array([response.room]))


def within_cap(
    token_segment: np.ndarray, tokens: np.ndarray, marked: Marked, room: np.ndarray
) -> np.ndarray:
    """Rule spans of many responses, flat: (tokens,) int16.

    token_segment: (tokens,) index into the segments of all rows, −1 for none; tokens: (segments,)
    how many each has; marked: indices into them; room: (rows,) tokens that a row's cap lets through.
    """
    first = np.sort(np.unique(marked.segment, return_index=True)[1])  # named again, it adds nothing
    segment, rank, row = marked.segment[first], marked.rank[first], marked.row[first]
    room = room[row]
    total = np.cumsum(tokens[segment])
    before = total - tokens[segment]
    used = total - before[np.searchsorted(row, row)]  # of the row, this segment included
    # What does not fit has only larger sums behind it.
    whole, cut = used <= room, (used > room) & (used == tokens[segment])
    rank_of = np.full(len(tokens) + 1, -1, dtype=np.int16)  # the last is that of no segment
    rank_of[segment[whole | cut]] = rank[whole | cut]
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
    """All tokens, whatever the cap: plain self-distillation."""
    return np.zeros(response.tokens, dtype=np.int16)


def random_tokens(response: Response) -> np.ndarray:
    """As many tokens as the cap lets through, drawn from the whole response."""
    return _drawn(response, np.arange(response.tokens))


def inverted(response: Response) -> np.ndarray:
    """As many tokens as the cap lets through, drawn from outside the annotator's marks."""
    return _drawn(response, np.flatnonzero(~response.marked))


RULES: dict[str, Rule] = {
    "spans": spans,
    "all": every_token,
    "random": random_tokens,
    "inverted": inverted,
}


def load_rule(name: str) -> Rule:
    """The rule of that name: one of RULES, or `module:function`, imported.

    Raises:
        InputError: no such rule, a module that cannot be imported, or nothing there to call.
    """
    if name in RULES:
        return RULES[name]
    module_name, colon, function = name.partition(":")
    if not (module_name and colon and function):
        raise InputError(
            f"routing.rule {name!r}: is none of {', '.join(RULES)}; name one of them, or "
            "module:function of your own"
        )
    if (folder := str(Path.cwd())) not in sys.path:  # where a run starts, in its workers too
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"routing.rule {name!r}: module {module_name} cannot be imported ({error}); run in its "
            "folder or set PYTHONPATH to it"
        ) from None
    rule = getattr(module, function, None)
    if not callable(rule):
        raise InputError(
            f"routing.rule {name!r}: module {module_name} has no function {function}; define it "
            "there"
        )
    return cast(Rule, rule)


def rule_source(name: str) -> str | None:
    """Source text of the file that holds a rule of the user's own; None for one of RULES.

    Its name alone does not tell what it routes: dataset ids hash this beside it.
    """
    if name in RULES:
        return None
    file = importlib.import_module(load_rule(name).__module__).__file__
    return Path(file).read_text() if file is not None else ""


def needs_annotations(config: RoutingConfig) -> bool:
    """Whether routing looks at annotations at all: at their spans, or at their type label."""
    if config.key is Action.NONE and config.error is Action.NONE:
        return False
    return config.teacher_context == "type" or config.rule not in ("all", "random")


def _nowhere(response: Response) -> np.ndarray:
    return np.full(response.tokens, -1, dtype=np.int16)


def _drawn(response: Response, candidates: np.ndarray) -> np.ndarray:
    """At most `room` of the candidates, without replacement, as span 0."""
    span_id = _nowhere(response)
    count = min(response.room, len(candidates))
    span_id[response.generator().choice(candidates, count, replace=False)] = 0
    return span_id
