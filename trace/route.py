"""Routes: which tokens of a response leave plain GRPO. A rule is one function.

responses.py calls `apply_rule` and `label_tokens` for the responses of a part; `trace-opd compare`
calls `route_tokens` for one. `routing.rule` names one of RULES (rules.py), or `file.py:function` or
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

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..schemas import own_code
from ..schemas.configs import RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route, SpanKind, TeacherContext
from .rule_inputs import Response
from .rules import RULES, SCORED, UNANNOTATED, Rule

_WHERE = "routing.rule"


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
    """Whether routing needs annotations: their spans, their type label, or their reflection."""
    if config.key is Route.GRPO and config.error is Route.GRPO:
        return False
    contexts = {config.teacher_context, config.contrast_context}
    read = not contexts.isdisjoint((TeacherContext.TYPE, TeacherContext.REFLECTION))
    return read or config.rule not in UNANNOTATED


def require_reflections(config: RoutingConfig, there: bool, how: str) -> None:
    """Raises InputError if the teacher reads reflections that no annotation has.

    there: whether annotations have them; how: what to do where they do not.
    """
    contexts = (config.teacher_context, config.contrast_context)
    if needs_annotations(config) and TeacherContext.REFLECTION in contexts and not there:
        raise InputError(
            f"routing.teacher_context is {config.teacher_context}, contrast_context "
            f"{config.contrast_context}, and there are no reflections: every response would be "
            f"plain GRPO; {how}"
        )


def require_scores(config: RoutingConfig, columns: Collection[str] | None) -> None:
    """Raises InputError if the rule reads scores that are not there.

    columns: of the scores table; None: there is none.
    """
    if config.key is Route.GRPO and config.error is Route.GRPO:
        return
    lacking = [name for name in SCORED.get(config.rule, ()) if name not in (columns or ())]
    if not lacking:
        return
    found = "there are no scores" if columns is None else f"the scores have no {lacking[0]}"
    raise InputError(
        f"routing.rule {config.rule}: reads {' and '.join(SCORED[config.rule])} of every token, "
        f"and {found}; convert with routing.rule=all, run `trace-opd score` on that with "
        "score.student, then convert with scores= set to its dataset (not in online training)"
    )


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
