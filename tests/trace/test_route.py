"""The α cap and the corner on worked examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.labels import Route, SpanKind
from trace_opd.trace.route import Routing, route_tokens
from trace_opd.trace.rule_inputs import Response

# Twelve tokens in four segments of three; a quarter of them is one segment.
SEGMENTS = np.repeat(np.arange(4), 3)


def response(spans, kind=SpanKind.KEY, segments=SEGMENTS, alpha=0.25) -> Response:
    tokens = np.zeros(len(segments))
    return Response("r", tokens.astype(int), tokens, segments, spans, kind, alpha)


def route(spans, kind=SpanKind.KEY, segments=SEGMENTS, **config) -> Routing:
    routing = RoutingConfig(**config)
    return route_tokens(response(spans, kind, segments, routing.alpha), routing)


def test_a_segment_within_the_cap_is_routed_completely():
    routing = route([[1]])
    assert routing.route.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert routing.span_id.tolist() == [-1, -1, -1, 0, 0, 0, -1, -1, -1, -1, -1, -1]
    assert (routing.coverage, routing.dropped_tokens) == (0.25, 0)


def test_labels_have_the_tables_types():
    routing = route([[1]])
    assert (routing.route.dtype, routing.span_id.dtype) == (np.uint8, np.int16)


def test_the_annotators_first_choice_is_kept_and_what_exceeds_the_cap_is_counted():
    routing = route([[2], [0], [3]])
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [6, 7, 8]
    assert routing.dropped_tokens == 6


def test_segments_of_one_span_are_kept_one_by_one_until_the_cap():
    routing = route([[0, 1, 2]], alpha=0.5)
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert (routing.coverage, routing.dropped_tokens) == (0.5, 3)


def test_spans_carry_their_rank():
    routing = route([[3], [0]], alpha=0.5)
    assert routing.span_id.tolist() == [1, 1, 1, -1, -1, -1, -1, -1, -1, 0, 0, 0]


def test_after_the_first_segment_that_does_not_fit_none_is_kept():
    # Segments of 2, 5 and 1 of 12 tokens, room for 4: 2 fit, 5 do not; the last one ranks lower.
    segments = np.array([0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3])
    routing = route([[0], [1], [2]], segments=segments, alpha=1 / 3)
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [0, 1]
    assert routing.dropped_tokens == 6


def test_a_first_segment_that_alone_exceeds_the_cap_is_cut_to_it():
    segments = np.array([0] * 8 + [1] * 4)
    routing = route([[0], [1]], segments=segments)
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [0, 1, 2]
    assert (routing.coverage, routing.dropped_tokens) == (0.25, 9)


def test_a_first_segment_without_tokens_leaves_the_cut_to_the_next():
    routing = route([[7], [0]], segments=np.array([0] * 8))
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [0, 1]
    assert (routing.span_id[:2].tolist(), routing.dropped_tokens) == ([1, 1], 6)


def test_the_cap_is_rounded_down():
    routing = route([[0]], segments=np.zeros(7, dtype=int))
    assert (routing.span_id >= 0).sum() == 1  # ⌊7 / 4⌋


def test_an_integer_cap_survives_floating_point():
    # 0.29 · 100 is 28.999999999999996 in binary.
    assert (route([[0]], segments=np.zeros(100, dtype=int), alpha=0.29).span_id >= 0).sum() == 29


def test_alpha_of_0_routes_nothing_and_counts_everything_as_dropped():
    routing = route([[0], [1]], alpha=0.0)
    assert (routing.route == Route.GRPO).all()
    assert (routing.coverage, routing.dropped_tokens) == (0.0, 6)


def test_a_segment_named_twice_counts_once():
    routing = route([[0], [0]], segments=np.zeros(8, dtype=int))
    assert routing.span_id.tolist() == [0, 0, -1, -1, -1, -1, -1, -1]
    assert routing.dropped_tokens == 6


@pytest.mark.parametrize("action", list(Route))
@pytest.mark.parametrize("kind", list(SpanKind))
def test_the_corner_gives_each_span_kind_its_action(kind, action):
    other = Route.RKL if action is Route.FKL else Route.FKL
    corner = {"key": action, "error": other} if kind is SpanKind.KEY else {
        "key": other, "error": action,
    }  # fmt: skip
    routing = route([[1]], kind, **corner)
    assert routing.route[3:6].tolist() == [action] * 3
    assert (np.delete(routing.route, [3, 4, 5]) == Route.GRPO).all()


def test_spans_without_an_action_are_plain_grpo_but_still_seen_in_the_table():
    routing = route([[1]], key="none")
    assert (routing.route == Route.GRPO).all()
    assert (routing.span_id[3:6].tolist(), routing.coverage) == ([0, 0, 0], 0.25)


def test_the_papers_corners():
    strong, weak = {"key": "fkl", "error": "none"}, {"key": "none", "error": "rkl"}
    assert route([[0]], SpanKind.KEY, **strong).route[0] == Route.FKL
    assert route([[0]], SpanKind.ERROR, **strong).route[0] == Route.GRPO
    assert route([[0]], SpanKind.KEY, **weak).route[0] == Route.GRPO
    assert route([[0]], SpanKind.ERROR, **weak).route[0] == Route.RKL


def test_tokens_without_bytes_are_never_routed():
    routing = route([[0]], segments=np.array([0, -1, 0, -1, 1, 1, 1, 1]))
    assert np.flatnonzero(routing.span_id >= 0).tolist() == [0, 2]


def test_an_empty_response_and_no_spans_are_fine():
    empty = route([], segments=np.empty(0, dtype=int))
    assert (len(empty.route), empty.coverage, empty.dropped_tokens) == (0, 0.0, 0)
    assert (route([]).route == Route.GRPO).all()


@given(
    st.lists(st.integers(-1, 5), max_size=40),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=4),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_the_cap_holds_and_marked_tokens_are_kept_or_dropped(segments, spans, alpha):
    routing = route(spans, segments=np.array(segments, dtype=int), alpha=alpha)
    kept = (routing.span_id >= 0).sum()
    marked = {segment for span in spans for segment in span}
    assert kept <= alpha * len(segments) + 1e-6
    assert kept + routing.dropped_tokens == sum(segment in marked for segment in segments)
    assert ((routing.route != Route.GRPO) == (routing.span_id >= 0)).all()
    assert all(
        segments[i] in spans[rank] for i, rank in enumerate(routing.span_id.tolist()) if rank >= 0
    )
