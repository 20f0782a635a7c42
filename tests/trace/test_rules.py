"""Route rules: which tokens each chooses and how many, and the user's own rules."""

import sys
from dataclasses import replace
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError, RowFault
from trace_opd.schemas.labels import Route, SpanKind
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, ROUTED, SCORES, VERDICTS
from trace_opd.trace.align import ByteTable
from trace_opd.trace.route import load_rule, needs_annotations, route_tokens, rule_source
from trace_opd.trace.routed import routed_table
from trace_opd.trace.rule_inputs import Response
from trace_opd.trace.rules import RULES

# Ten tokens in five segments of two; the annotator marked the middle one.
SEGMENTS = np.repeat(np.arange(5), 2)


def response(rollout_id="r", alpha=0.25, spans=((2,),), segments=SEGMENTS, logprobs=None):
    tokens = len(segments)
    return Response(
        rollout_id=rollout_id,
        token_ids=np.arange(tokens),
        logprobs=np.zeros(tokens) if logprobs is None else np.array(logprobs),
        token_segment=segments,
        spans=spans,
        kind=SpanKind.KEY,
        alpha=alpha,
    )


def chosen(rule: str, *args, **kwargs) -> list[int]:
    return np.flatnonzero(RULES[rule](response(*args, **kwargs)) >= 0).tolist()


def test_the_worked_example():
    assert chosen("spans") == [4, 5]
    assert chosen("all") == list(range(10))
    assert len(chosen("random")) == 2
    assert len(chosen("inverted")) == 2


def test_all_ignores_the_cap_and_the_marks():
    assert chosen("all", alpha=0.1, spans=()) == list(range(10))


def test_random_tokens_come_from_the_whole_response_marked_or_not():
    drawn = {token for seed in range(60) for token in chosen("random", f"r{seed}")}
    assert drawn == set(range(10))


def test_inverted_tokens_are_never_marked_and_come_from_all_others():
    drawn = {token for seed in range(60) for token in chosen("inverted", f"r{seed}")}
    assert drawn == {0, 1, 2, 3, 6, 7, 8, 9}


def test_inverted_takes_what_there_is_where_the_marks_leave_less_than_the_cap():
    assert chosen("inverted", alpha=0.5, spans=((0, 1), (2, 3))) == [8, 9]
    assert chosen("inverted", spans=((0, 1, 2, 3, 4),)) == []


@pytest.mark.parametrize("rule", ["random", "inverted"])
def test_a_rollouts_draw_is_the_same_in_every_run_and_its_own(rule):
    draws = [chosen(rule, f"r{seed}") for seed in range(20)]
    assert draws == [chosen(rule, f"r{seed}") for seed in range(20)]
    assert len({tuple(draw) for draw in draws}) > 5


@given(
    st.lists(st.integers(-1, 5), max_size=40),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=4),
    st.floats(0, 1),
    st.sampled_from(sorted({*RULES} - {"all", "from_first_span"})),
)
@settings(deadline=None)
def test_no_capped_rule_exceeds_alpha(segments, spans, alpha, rule):
    draw = np.random.default_rng(len(segments))
    given_response = replace(
        response("r", alpha, spans, np.array(segments, dtype=int)),
        logprobs=draw.integers(-3, 1, len(segments)),
        entropy=draw.integers(0, 3, len(segments)),
        divergence=draw.random(len(segments)),
    )
    span_id = RULES[rule](given_response)
    count = (span_id >= 0).sum()
    assert count <= alpha * len(segments) + 1e-6
    if rule in ("random", "prefix", "surprise", "entropy", "importance"):
        assert count == given_response.room
    if rule == "inverted":
        outside = ~given_response.marked
        assert count == min(given_response.room, outside.sum())
        assert outside[span_id >= 0].all()


@given(
    st.lists(st.integers(-1, 3), max_size=16),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]),
)
@settings(deadline=None, max_examples=300)
def test_spans_are_kept_segment_by_segment_until_the_cap(segments, spans, alpha):
    """The slow twin processes the named segments one by one."""
    given_response = response("r", alpha, spans, np.array(segments, dtype=int))
    expected, kept, full = [-1] * len(segments), 0, False
    for rank, segment in ((rank, segment) for rank, span in enumerate(spans) for segment in span):
        at = [i for i, own in enumerate(segments) if own == segment and expected[i] < 0]
        left = given_response.room - kept
        full = full or len(at) > left
        if full and kept:
            break
        for i in at[:left]:
            expected[i] = rank
        kept += len(at[:left])
    assert RULES["spans"](given_response).tolist() == expected


# --- the first mark, the beginning, the unlikely ---

# Twelve tokens: segments of 3, 0, 4, 2 and 2 tokens, and one token without bytes at the end.
UNEVEN = np.array([0, 0, 0, 2, 2, 2, 2, 3, 3, 4, 4, -1])


def test_the_first_span_is_the_earliest_mark_alone_whatever_the_annotator_ranks_first():
    ranked = {"spans": ((4,), (2, 3)), "segments": UNEVEN, "alpha": 0.5}
    assert chosen("first_span", **ranked) == [3, 4, 5, 6]
    assert RULES["first_span"](response(**ranked))[3:7].tolist() == [1] * 4  # its span's rank
    assert chosen("spans", **ranked) == [3, 4, 5, 6, 9, 10]


def test_the_first_span_is_cut_to_the_cap_and_skips_a_segment_without_tokens():
    assert chosen("first_span", spans=((3,), (1, 2)), segments=UNEVEN, alpha=0.25) == [3, 4, 5]
    assert chosen("first_span", spans=((1,), (3,)), segments=UNEVEN, alpha=0.5) == [7, 8]
    assert chosen("first_span", spans=((2,),), segments=UNEVEN, alpha=0.0) == []


def test_from_the_first_span_on_all_is_routed_without_a_cap():
    ranked = {"spans": ((4,), (3,)), "segments": UNEVEN, "alpha": 0.1}
    assert chosen("from_first_span", **ranked) == [7, 8, 9, 10, 11]
    assert RULES["from_first_span"](response(**ranked))[7:].tolist() == [1] * 5
    assert chosen("from_first_span", spans=((0,),), segments=UNEVEN) == list(range(12))


@pytest.mark.parametrize("rule", ["first_span", "from_first_span"])
@pytest.mark.parametrize("spans", [(), ((1,),), ((7,),)], ids=["none", "no tokens", "not there"])
def test_without_a_mark_that_has_tokens_nothing_is_first(rule, spans):
    assert chosen(rule, spans=spans, segments=UNEVEN) == []


def test_the_prefix_is_as_many_first_tokens_as_the_cap_allows():
    assert chosen("prefix", spans=(), alpha=0.39) == [0, 1, 2]
    assert chosen("prefix", spans=(), alpha=0.0) == []
    assert chosen("prefix", alpha=1.0) == list(range(10))


def test_surprise_takes_the_least_likely_tokens_and_of_equal_ones_the_earlier():
    logprobs = [-0.1, -3.0, -0.2, -1.0, -0.3, -1.0, -5.0, -0.1, -1.0, -0.1]
    assert chosen("surprise", logprobs=logprobs, alpha=0.2) == [1, 6]
    assert chosen("surprise", logprobs=logprobs, alpha=0.4) == [1, 3, 5, 6]


# --- scores ---


def scored(rule: str, entropy: list[float], divergence: list[float], alpha: float) -> list[int]:
    one = response(segments=np.zeros(len(entropy), dtype=int), spans=(), alpha=alpha)
    one = replace(
        one,
        entropy=np.array(entropy, dtype=np.float32),
        divergence=np.array(divergence, dtype=np.float32),
    )
    return np.flatnonzero(RULES[rule](one) >= 0).tolist()


def test_entropy_takes_the_most_uncertain_tokens_and_of_equal_ones_the_earlier():
    assert scored("entropy", [0.1, 2.0, 0.5, 0.5, 1.0], [9, 0, 9, 9, 9], 0.6) == [1, 2, 4]


def test_importance_is_high_where_entropy_or_divergence_is():
    """h = 0, 1, ½, 0, 0 (entropies 1 … 3 of which the 98th percentile is 2.96, so the clip takes
    the second to 2.96 and ½ becomes 0.5102); d = 0, 0, ½, 1, 0.1. The scores are 0, 1, 0.755, 1
    and 0.1.
    """
    entropy, divergence = [1.0, 3.0, 2.0, 1.0, 1.0], [0.2, 0.2, 0.7, 1.2, 0.3]
    assert scored("importance", entropy, divergence, 0.2) == [1]  # equal to the fourth: earlier
    assert scored("importance", entropy, divergence, 0.4) == [1, 3]
    assert scored("importance", entropy, divergence, 0.6) == [1, 2, 3]
    assert scored("importance", entropy, divergence, 0.8) == [1, 2, 3, 4]


def test_one_very_uncertain_token_does_not_flatten_the_other_entropies():
    """Of 101 tokens entropy 1 … 100, and one of 1000, the 98th percentile is 99: the clip makes
    the one at 60 clearly more important than a divergence of a half.
    """
    entropy = [*range(1, 101), 1000]
    divergence = [0.0] * 101
    divergence[0], divergence[1] = 1.0, 0.5  # h = 0 and d = 1; h = 0.01 and d = 0.5
    order = [t for n in range(102) for t in scored("importance", entropy, divergence, n / 101)]
    first_taken = {token: order.index(token) for token in set(order)}
    assert first_taken[59] < first_taken[1]  # h = 59 / 98 = 0.6
    assert first_taken[1] < first_taken[44]  # h = 44 / 98 = 0.45


def test_a_response_of_equal_scores_gives_its_first_tokens():
    assert scored("importance", [1.0] * 8, [0.5] * 8, 0.25) == [0, 1]
    assert scored("importance", [], [], 0.5) == []


PROBLEM = {
    "problem_id": "p", "problem": "1+1", "answer": "2", "answer_kind": "math", "solution": None,
    "source": "t", "split": "train",
}  # fmt: skip


def tables(correct: tuple[bool, ...]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """A problem, and a rollout of four tokens per verdict, with token k of log-probability −k."""
    ids = [{"rollout_id": f"r{n}", "problem_id": "p", "group_id": "g"} for n in range(len(correct))]
    rollouts = ROLLOUTS.table(
        one
        | {
            "sample_index": n, "prompt_token_ids": [0], "token_ids": [0, 1, 2, 3],
            "logprobs": [0.0, -1.0, -2.0, -3.0], "response": "abcd", "finish_reason": "stop",
            "policy_name": "p", "policy_revision": "r", "policy_step": 0, "vocab_fingerprint": "",
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "seed": n,
            "on_policy": True,
        }
        for n, one in enumerate(ids)
    )  # fmt: skip
    verdicts = VERDICTS.table(
        one
        | {
            "reward": float(right), "correct": right, "parsed_answer": None, "status": "ok",
            "verifier": "t", "seconds": 0.0,
        }
        for one, right in zip(ids, correct, strict=True)
    )  # fmt: skip
    return PROBLEMS.table([PROBLEM]), rollouts, verdicts


def scores_of(**entropies: list[float]) -> pa.Table:
    """Scores of some rollouts with these entropies; the divergence is the entropy backwards."""
    return SCORES.table(
        {
            "rollout_id": name, "positions": list(range(len(entropy))), "top_token_ids": [],
            "top_logprobs": [], "tail_logprobs": [0.0] * len(entropy),
            "logprobs": [0.0] * len(entropy), "temperature": 1.0, "teacher_name": "t",
            "teacher_revision": "r", "student_entropy": entropy, "divergence": entropy[::-1],
        }
        for name, entropy in entropies.items()
    )  # fmt: skip


def routes(rule: str, scores: pa.Table | None, correct=(True, False), **config) -> list[list[int]]:
    routing = RoutingConfig.model_validate(
        {"rule": rule, "alpha": 0.5, "teacher_context": "answer", "key": "rkl", "error": "rkl"}
        | config
    )
    pieces = ByteTable((b"a", b"b", b"c", b"d"))
    problems, rollouts, verdicts = tables(correct)
    table = routed_table(problems, rollouts, verdicts, None, pieces, routing, scores=scores)
    return [np.flatnonzero(row).tolist() for row in validate(table, ROUTED)["route"].to_pylist()]


def test_scores_are_found_by_rollout_whatever_their_order():
    scores = scores_of(r1=[3.0, 0.0, 0.0, 2.0], other=[9.0], r0=[0.0, 1.0, 2.0, 0.5])
    assert routes("entropy", scores) == [[1, 2], [0, 3]]
    assert routes("importance", scores_of(r0=[0, 0, 0, 4.0], r1=[1.0, 2.0, 4.0, 1.0])) == [
        [0, 3],
        [1, 2],
    ]
    # Rules that need no scores do not read them.
    assert routes("surprise", scores) == [[2, 3], [2, 3]]


def test_a_rule_that_reads_scores_says_how_to_get_them():
    how = r"convert with routing.rule=all, run `trace-opd score` on that with score.student, then"
    with pytest.raises(InputError, match=rf"rule entropy: reads student_entropy .*{how}"):
        routes("entropy", None)
    lean = scores_of(r0=[1.0] * 4, r1=[1.0] * 4).drop_columns(["divergence"])
    with pytest.raises(InputError, match=r"rule importance: .* the scores have no divergence"):
        routes("importance", lean)
    assert routes("entropy", lean) == [[0, 1], [0, 1]]
    assert routes("entropy", None, key="none", error="none") == [[], []]


@pytest.mark.parametrize(
    "partial",
    [
        scores_of(r0=[0.0, 1.0, 2.0, 3.0]),
        scores_of(r0=[0.0, 1.0, 2.0, 3.0], r1=[1.0, 2.0]),
        scores_of(r0=[0.0, 1.0, 2.0, 3.0], r1=[]),
    ],
    ids=["no row", "some tokens", "no tokens"],
)
def test_only_responses_that_stay_grpo_may_lack_scores(partial):
    assert routes("entropy", partial, error="none") == [[2, 3], []]
    with pytest.raises(RowFault, match="rollout r1: the scores do not cover all of its tokens"):
        routes("entropy", partial)


def test_scores_of_other_positions_are_none():
    rows = scores_of(r0=[1.0] * 4, r1=[1.0] * 4).to_pylist()
    rows[1]["positions"] = [0, 1, 2, 4]
    with pytest.raises(RowFault, match="rollout r1"):
        routes("entropy", SCORES.table(rows))


# --- the user's own rules ---


def test_a_users_rule_sees_scores_where_all_tokens_have_them(own_module):
    own_module(
        """
        import numpy as np


        def above(response):
            if response.entropy is None:
                return np.full(response.tokens, -1)
            return np.where(response.entropy + response.divergence > 3, 0, -1)
        """
    )
    scores = scores_of(r0=[3.0, 0.0, 1.0, 2.0], r1=[5.0, 5.0])
    assert routes("my_rules:above", scores) == [[0, 3], []]
    assert routes("my_rules:above", None) == [[], []]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module with that text, importable during the test only."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "my_rules.py").write_text(dedent(text))

    yield write
    sys.modules.pop("my_rules", None)


SURPRISING = '''
    import numpy as np


    def surprising(response):
        """Route the tokens that the policy found least likely, as many as the cap lets through."""
        span_id = np.full(response.tokens, -1)
        span_id[np.argsort(response.logprobs, kind="stable")[: response.room]] = 0
        return span_id
'''


def test_a_users_rule_is_one_function_in_one_file(own_module):
    own_module(SURPRISING)
    logprobs = [-0.1, -3.0, -0.2, -0.1, -0.3, -0.1, -5.0, -0.1, -0.2, -0.1]
    routing = route_tokens(
        response(logprobs=logprobs), RoutingConfig(rule="my_rules:surprising", key="rkl")
    )
    assert np.flatnonzero(routing.route == Route.RKL).tolist() == [1, 6]
    assert (routing.coverage, routing.dropped_tokens) == (0.2, 2)


def test_only_a_users_rule_has_its_source_recorded(own_module):
    own_module(SURPRISING)
    assert rule_source("my_rules:surprising") == dedent(SURPRISING)
    assert [rule_source(name) for name in RULES] == [None] * len(RULES)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("some", "is none of spans, first_span, "),
        (":rule", "write file.py:Class"),
        ("my_rules:", "write file.py:Class"),
        ("no_such_module:rule", "module no_such_module cannot be imported"),
        ("my_rules:other", "module my_rules has no class or function other; it has none"),
        ("my_rules:np.full", "write file.py:Class"),
        ("my_rules:LIMIT", "has no class or function LIMIT"),
    ],
)
def test_a_missing_rule_is_named(own_module, name, sentence):
    own_module("import numpy as np\n\nLIMIT = 3\n")
    with pytest.raises(InputError, match=sentence) as error:
        load_rule(name)
    assert str(error.value).startswith(f"routing.rule {name!r}: ")


@pytest.mark.parametrize(
    "body",
    [
        "np.arange(response.room)",
        "response.marked",
        "np.full(response.tokens, 0.5)",
        "np.full(response.tokens, 40_000)",
        "None",
    ],
    ids=["positions", "a mask", "floats", "too large", "nothing"],
)
def test_other_values_than_a_span_id_per_token_are_refused(own_module, body):
    own_module(f"import numpy as np\n\n\ndef rule(response):\n    return {body}\n")
    with pytest.raises(InputError, match=r"return one integer per token, its span's rank"):
        route_tokens(response(), RoutingConfig(rule="my_rules:rule"))


# --- rules that need the annotator ---

CONTRAST = {"rule": "all", "teacher_context": "peer", "key": "reweight", "error": "reweight"}


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({}, True),
        ({"key": "none", "error": "none"}, False),
        ({"rule": "all"}, True),  # for the type label
        ({"rule": "all", "teacher_context": "peer"}, False),
        ({"rule": "random", "teacher_context": "solution"}, False),
        ({"rule": "inverted", "teacher_context": "answer"}, True),
        ({"rule": "spans", "teacher_context": "answer"}, True),
        ({"rule": "my_rules:rule", "teacher_context": "answer"}, True),
        ({"rule": "first_span", "teacher_context": "answer"}, True),
        ({"rule": "from_first_span", "teacher_context": "answer"}, True),
        *(
            ({"rule": rule, "teacher_context": "answer"}, False)
            for rule in ("prefix", "surprise", "entropy", "importance")
        ),
        ({"rule": "all", "teacher_context": "reflection"}, True),
        ({"rule": "all", "teacher_context": "none"}, False),
        (CONTRAST | {"contrast_context": "reflection"}, True),
        (CONTRAST | {"contrast_context": "wrong_peer"}, False),
    ],
)
def test_the_annotator_is_needed_for_spans_and_for_the_type_label(config, needed):
    assert needs_annotations(RoutingConfig(**config)) is needed
