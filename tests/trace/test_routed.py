"""Routed tables of worked examples: routed tokens, the teacher's context, responses left out."""

import re
import sys
from dataclasses import replace

import pyarrow as pa
import pytest

from trace_opd.schemas.configs import PromptConfig, RoutingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import DiagnosticType, Route, SpanKind
from trace_opd.trace.prompt import teacher_chat

# Three segments; the end token is the ninth.
RIGHT = {"text": "ab\ncd\nef", "correct": True}
WRONG = {"text": "AB\nCD\nEF", "correct": False}
KEY = {"label": DiagnosticType.COUNTING, "marked": ([1],)}
ERROR = {"label": DiagnosticType.SETUP, "marked": ([0],)}
FKL, RKL, JSD = (int(route) for route in (Route.FKL, Route.RKL, Route.JSD))
BOTH = {"key": "fkl", "error": "rkl", "alpha": 0.5}


def routing(**fields) -> RoutingConfig:
    return RoutingConfig(**(BOTH | fields))


def test_spans_are_routed_by_correctness_and_the_teacher_sees_only_their_label(example):
    rows = example(RIGHT | KEY, WRONG | ERROR, RIGHT).routed(routing())
    assert [row["route"] for row in rows] == [
        [0, 0, 0, FKL, FKL, FKL, 0, 0, 0],
        [RKL, RKL, RKL, 0, 0, 0, 0, 0, 0],
        [0] * 9,
    ]
    assert [row["diagnostic_type"] for row in rows] == ["counting", "setup", None]
    assert [row["teacher_context"] for row in rows] == [None] * 3


def test_with_rule_all_the_label_comes_from_the_annotation_whatever_it_marked(example):
    unmarked = RIGHT | {"label": DiagnosticType.COUNTING, "marked": ()}
    rows = example(unmarked, WRONG | ERROR, WRONG).routed(routing(rule="all"))
    assert [row["route"] for row in rows] == [[FKL] * 9, [RKL] * 9, [0] * 9]
    assert [row["diagnostic_type"] for row in rows] == ["counting", "setup", None]
    assert [row["coverage"] for row in rows] == [1.0, 1.0, 0.0]


def test_without_annotations_type_routes_nothing_and_another_context_routes_on(example):
    made = example(RIGHT | KEY, WRONG | ERROR)
    bare = type(made)(made.problems, made.rollouts, made.verdicts, None, made.bytes)
    assert [row["route"] for row in bare.routed(routing(rule="all"))] == [[0] * 9] * 2
    found = bare.routed(routing(rule="all", teacher_context="answer"))
    assert [row["route"] for row in found] == [[FKL] * 9, [RKL] * 9]
    assert [row["diagnostic_type"] for row in found] == [None, None]


@pytest.mark.parametrize("context", ["type", "answer", "solution", "peer"])
def test_without_a_teacher_every_response_is_plain_grpo(example, context):
    made = example(RIGHT | KEY, WRONG | ERROR)
    for row in made.routed(routing(rule="all", teacher_context=context), with_teacher=False):
        assert row["route"] == [0] * 9
        assert row["span_id"] == [-1] * 9
        assert (row["diagnostic_type"], row["teacher_context"]) == (None, None)
        assert (row["coverage"], row["dropped_tokens"]) == (0.0, 3)


@pytest.mark.parametrize("context", ["answer", "solution"])
def test_the_teacher_sees_the_problems_answer_or_solution(example, context):
    made = example(RIGHT | KEY, RIGHT | {"group": "h"} | KEY)
    rows = made.routed(routing(teacher_context=context))
    assert [row["teacher_context"] for row in rows] == [f"{context} g", f"{context} h"]
    assert [row["route"] for row in rows] == [[0, 0, 0, FKL, FKL, FKL, 0, 0, 0]] * 2


@pytest.mark.parametrize("solution", [None, ""])
def test_without_a_solution_to_tell_a_response_is_plain_grpo(example, solution):
    made = example(RIGHT | KEY, WRONG | ERROR).with_problems(solution=solution)
    for row in made.routed(routing(rule="all", teacher_context="solution")):
        assert row["route"] == [0] * 9
        assert (row["teacher_context"], row["diagnostic_type"], row["coverage"]) == (None, None, 0)


def test_a_context_stands_only_where_tokens_are_routed(example):
    made = example(RIGHT | KEY, WRONG | ERROR)
    right, wrong = made.routed(routing(error="none", teacher_context="answer"))
    assert right["teacher_context"] == "answer g"
    assert wrong["teacher_context"] is None
    assert wrong["span_id"][:3] == [0, 0, 0]  # seen in the table, as under TRACE


# --- peers ---


def contexts(example, *samples) -> list[str | None]:
    rows = example(*samples).routed(routing(rule="all", teacher_context="peer"))
    for row in rows:
        assert any(row["route"]) == (row["teacher_context"] is not None)
    return [row["teacher_context"] for row in rows]


def test_a_peer_is_the_first_other_correct_response_of_the_group(example):
    a, b = RIGHT | {"text": "a"}, RIGHT | {"text": "b"}
    assert contexts(example, WRONG, a, WRONG, b) == ["a", "b", "a", "a"]


def test_the_only_correct_response_has_no_peer(example):
    assert contexts(example, RIGHT | {"text": "a"}, WRONG) == [None, "a"]


def test_no_peer_comes_from_another_group_or_from_a_wrong_or_unscored_response(example):
    other = RIGHT | {"group": "h"}
    assert contexts(example, WRONG, WRONG, {"text": "x", "correct": None}, other, WRONG) == (
        [None, None, None, None]
    )


def test_the_first_peer_is_by_sample_index_whatever_the_tables_order(example):
    made = example(RIGHT | {"text": "a"}, RIGHT | {"text": "b"}, WRONG)
    backwards = [2, 1, 0]
    turned = type(made)(
        made.problems, *(t.take(backwards) for t in (made.rollouts, made.verdicts)), None,
        made.bytes,
    )  # fmt: skip
    rows = turned.routed(routing(rule="all", teacher_context="peer"))
    assert [row["teacher_context"] for row in rows] == ["a", "a", "b"]


# --- rewards ---


def test_unscored_responses_leave_their_group_before_its_advantages(example):
    rows = example(RIGHT, {"text": "x", "correct": None}, WRONG).routed(routing())
    assert [row["rollout_id"] for row in rows] == ["r0", "r2"]
    assert [row["advantage"] for row in rows] == pytest.approx([2**-0.5, -(2**-0.5)], rel=1e-3)


def test_marks_stay_with_their_response_when_others_are_left_out(example):
    rows = example({"text": "x", "correct": None}, RIGHT | KEY).routed(routing())
    assert [row["route"] for row in rows] == [[0, 0, 0, FKL, FKL, FKL, 0, 0, 0]]


def test_masked_truncated_responses_count_in_their_group_and_are_left_out(example):
    cut = WRONG | {"truncated": True}
    kept = example(RIGHT, WRONG, cut, cut).routed(routing())
    masked = example(RIGHT, WRONG, cut, cut).routed(routing(overlong="mask"))
    assert [row["rollout_id"] for row in masked] == ["r0", "r1"]
    assert masked == kept[:2]  # advantages over all four


def test_the_soft_penalty_shapes_rewards_before_advantages_and_leaves_correct(example):
    # The limit is 20 tokens, the buffer 8: 9 tokens cost nothing, 16 half, 20 all.
    long, full = RIGHT | {"text": "x" * 15}, RIGHT | {"text": "x" * 20, "truncated": True}
    rows = example(RIGHT, long, full, WRONG).routed(
        routing(overlong="soft", overlong_buffer=8, advantage="mean")
    )
    assert [row["reward"] for row in rows] == [1.0, 0.5, 0.0, 0.0]
    assert [row["advantage"] for row in rows] == [0.625, 0.125, -0.375, -0.375]
    assert [row["correct"] for row in rows] == [True, True, True, False]


def test_the_routed_table_does_not_depend_on_the_buffer_unless_the_penalty_is_soft(example):
    made = example(RIGHT, WRONG | {"text": "x" * 20, "truncated": True})
    assert made.routed(routing(overlong_buffer=1)) == made.routed(routing(overlong_buffer=20))


# --- the privilege boundary ---


@pytest.mark.parametrize("rule", ["spans", "all", "random", "inverted"])
def test_under_the_type_label_no_answer_solution_or_peer_reaches_table_or_prompt(example, rule):
    secret = example(RIGHT | KEY, RIGHT | {"text": "SECRET\nSECRET"} | KEY, WRONG | ERROR)
    secret_problems = secret.with_problems(answer="SECRET", solution="SECRET")
    rows, plain = secret_problems.routed(routing(rule=rule)), secret.routed(routing(rule=rule))
    assert any(any(row["route"]) for row in rows)
    assert rows == plain  # the table itself does not change
    for row in rows:
        assert row["teacher_context"] is None
        if any(row["route"]):
            label = row["diagnostic_type"]
            chat = teacher_chat(PromptConfig(), row["problem"], label, row["teacher_context"])
            assert not re.search("SECRET", repr(chat))


def test_tables_of_other_rollouts_are_refused(example):
    made, other = example(RIGHT, WRONG), example(RIGHT)
    broken = type(made)(made.problems, made.rollouts, made.verdicts, other.annotations, made.bytes)
    with pytest.raises(InputError, match="annotations, row 1: rollout_id is missing"):
        broken.routed(routing())


def replaced(made, name: str, column: str, values: list):
    """The tables with other values in one column."""
    table = getattr(made, name)
    at = table.schema.get_field_index(column)
    field = table.schema.field(at)
    return replace(made, **{name: table.set_column(at, field, pa.array(values, field.type))})


def test_a_response_that_its_tokens_do_not_spell_is_refused(example):
    made = example(RIGHT, RIGHT, WRONG, WRONG)
    texts = ["ab\ncd\nef", "ab\ncd\nef", "AB\nCD\nEG", "AB"]
    with pytest.raises(InputError, match="rollout r2: token_ids do not spell the response under"):
        replaced(made, "rollouts", "response", texts).routed(routing())


def test_a_response_that_is_left_out_may_have_any_text(example):
    made = example(RIGHT, {"text": "x", "correct": None}, WRONG)
    broken = replaced(made, "rollouts", "response", ["ab\ncd\nef", "other", "AB\nCD\nEF"])
    assert broken.routed(routing()) == made.routed(routing())


@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 3), (3, 6), (6, 9)],  # past the end
        [(0, 3), (3, 6)],  # short of it
        [(0, 3), (4, 6), (6, 8)],  # a hole
        [(1, 3), (3, 6), (6, 8)],  # a late start
        [(0, 6), (6, 3), (3, 8)],  # backwards
    ],
)
def test_segments_that_do_not_tile_their_response_are_refused(example, bounds):
    made = example(RIGHT | KEY, WRONG | ERROR, RIGHT)
    tiles = [{"start": a, "end": b} for a, b in [(0, 3), (3, 6), (6, 8)]]
    torn = [tiles, [{"start": a, "end": b} for a, b in bounds], tiles]
    with pytest.raises(InputError, match=r"rollout r1: the annotation's segments do not tile"):
        replaced(made, "annotations", "segments", torn).routed(routing())


def test_a_rollout_of_a_missing_problem_is_refused(example):
    made = example(RIGHT, RIGHT | {"group": "h"})
    with pytest.raises(InputError, match=r"rollout r1: problem p-h is not in the problems table"):
        replace(made, problems=made.problems.slice(0, 1)).routed(routing())


def test_a_users_rule_sees_each_response_that_has_a_teacher(example, tmp_path, monkeypatch):
    (tmp_path / "seeing.py").write_text(
        "seen = []\n\n\ndef rule(response):\n"
        "    seen.append(response)\n    return response.token_segment\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = example(WRONG, RIGHT | KEY, WRONG | ERROR).routed(routing(rule="seeing:rule"))
    first, second = sys.modules.pop("seeing").seen
    assert (first.rollout_id, second.rollout_id) == ("r1", "r2")
    assert (first.kind, second.kind) == (SpanKind.KEY, SpanKind.ERROR)
    assert (first.spans, second.spans) == ([[1]], [[0]])
    assert second.token_ids.tolist() == rows[2]["token_ids"]
    assert second.logprobs.tolist() == [-0.5] * 9
    assert second.token_segment.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, -1]
    assert [row["span_id"] for row in rows] == [[-1] * 9, *[[0, 0, 0, 1, 1, 1, 2, 2, -1]] * 2]
