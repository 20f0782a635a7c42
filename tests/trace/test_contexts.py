"""What each response's teacher sees: peers, another problem's solution, a reflection, nothing."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ANNOTATIONS, ROUTED
from trace_opd.trace.contexts import other_solutions, peers
from trace_opd.trace.route import needs_annotations
from trace_opd.trace.routed import routed_table

ALL = {"rule": "all", "key": "reweight", "error": "reweight"}


def routing(context: str, **fields) -> RoutingConfig:
    return RoutingConfig(**(ALL | {"teacher_context": context} | fields))


def contexts(rows: list[dict], column: str = "teacher_context") -> list:
    return [row[column] for row in rows]


def rollouts(groups: list[int], order: list[int], lengths: list[int]) -> pa.Table:
    return pa.table(
        {
            "group_id": [f"g{group}" for group in groups],
            "sample_index": order,
            "token_ids": [[0] * length for length in lengths],
        }
    )


@settings(deadline=None)
@given(st.data())
def test_peers_are_the_first_others_of_the_group_or_the_shortest(data):
    size = data.draw(st.integers(1, 12))

    def drawn(numbers) -> list:
        return data.draw(st.lists(numbers, min_size=size, max_size=size))

    groups, lengths = drawn(st.integers(0, 2)), drawn(st.integers(1, 3))
    order = data.draw(st.permutations(range(size)))
    among, count = np.array(drawn(st.booleans())), data.draw(st.integers(1, 4))
    shortest = data.draw(st.booleans())
    found = peers(rollouts(groups, order, lengths), among, count, shortest)
    for row in range(size):
        others = [i for i in range(size) if groups[i] == groups[row] and among[i] and i != row]
        others.sort(key=lambda i: (lengths[i] if shortest else 0, order[i]))
        assert found[row].tolist() == (others + [-1] * count)[:count]


def test_the_shortest_peer_is_counted_in_tokens(example):
    made = example(
        {"text": "1+1=2", "correct": True},
        {"text": "2", "correct": True},
        {"text": "12", "correct": True},
        {"text": "3", "correct": False},
    )
    assert contexts(made.routed(routing("shortest_peer"))) == [
        "12" if i == 1 else "2" for i in range(4)
    ]
    assert contexts(made.routed(routing("peer"))) == ["2", "1+1=2", "1+1=2", "1+1=2"]


def test_wrong_peers_are_contrasts_that_responses_share(example):
    made = example(
        {"text": "2", "correct": True},
        {"text": "20", "correct": True},
        {"text": "3", "correct": False},
        {"text": "4", "correct": False},
        {"text": "5", "correct": False},
    )
    rows = made.routed(routing("peer", contrast_context="wrong_peer", contrasts=2))
    assert contexts(rows, "contrast_contexts") == [
        ["3", "4"], ["3", "4"], ["4", "5"], ["3", "5"], ["3", "4"],
    ]  # fmt: skip
    rows = made.routed(routing("wrong_peer"))
    assert contexts(rows) == ["3", "3", "4", "3", "3"]
    assert "contrast_contexts" not in rows[0]


def test_a_response_with_fewer_wrong_peers_than_contrasts_has_those(example):
    made = example(
        {"text": "2", "correct": True},
        {"text": "20", "correct": True},
        {"text": "3", "correct": False},
        {"text": "4", "correct": False},
    )
    rows = made.routed(routing("peer", contrast_context="wrong_peer", contrasts=3))
    assert contexts(rows, "contrast_contexts") == [["3", "4"], ["3", "4"], ["4"], ["3"]]


def test_without_a_contrast_a_response_is_plain_grpo(example):
    made = example(
        {"text": "2", "correct": True},
        {"text": "20", "correct": True},
        {"text": "3", "correct": False},
    )
    rows = made.routed(routing("peer", contrast_context="wrong_peer"))
    assert contexts(rows, "contrast_contexts") == [["3"], ["3"], None]  # itself is no peer
    assert [any(row["route"]) for row in rows] == [True, True, False]
    assert contexts(rows)[2] is None


def test_no_context_is_an_empty_text_which_every_response_has(example):
    made = example({"text": "2", "correct": True}, {"text": "3", "correct": False})
    rows = made.routed(routing("none"))
    assert contexts(rows) == ["", ""]
    assert all(all(row["route"]) for row in rows)
    rows = made.routed(routing("answer", contrast_context="none"))
    assert contexts(rows, "contrast_contexts") == [[""], [""]]


def problems(*rows: tuple[str, str, str | None]) -> pa.Table:
    return pa.table(
        dict(zip(("problem_id", "problem", "solution"), zip(*rows, strict=True), strict=True))
    )


def test_another_solution_is_that_of_the_next_problem_by_id():
    table = problems(("c", "3?", "three"), ("a", "1?", "one"), ("b", "2?", None))
    assert other_solutions(table) == {"a": "three", "b": "three", "c": "one"}


def test_another_solution_is_never_that_of_the_same_text():
    table = problems(("a", "1?", "one"), ("b", "1?", "uno"), ("c", "3?", "three"))
    assert other_solutions(table) == {"a": "three", "b": "three", "c": "one"}
    assert other_solutions(problems(("a", "1?", "one"), ("b", "1?", "uno"))) == {}


def test_every_response_gets_the_solution_of_another_problem(example):
    samples = [{"text": text, "correct": True, "group": text} for text in ("1", "2", "3")]
    rows = example(*samples).routed(routing("other_solution"))
    assert contexts(rows) == ["solution 2", "solution 3", "solution 1"]
    (row,) = example(samples[0]).routed(routing("other_solution"))
    assert (row["teacher_context"], any(row["route"])) == (None, False)


def test_a_reflection_is_the_annotations_own_and_absent_in_old_tables(example):
    made = example({"text": "2", "correct": True}, {"text": "3", "correct": False})
    old = made.annotations.drop_columns(
        [name for name in ("reflection",) if name in made.annotations.column_names]
    )
    made = replace(made, annotations=old)
    assert contexts(made.routed(routing("reflection"))) == [None, None]
    reflected = [
        row | {"reflection": text}
        for row, text in zip(old.to_pylist(), ["count again", None], strict=True)
    ]
    made = replace(made, annotations=ANNOTATIONS.table(reflected))
    rows = made.routed(routing("reflection"))
    assert contexts(rows) == ["count again", None]
    assert [any(row["route"]) for row in rows] == [True, False]


def test_a_reflection_needs_an_annotator_as_teacher_or_contrast():
    assert needs_annotations(routing("reflection"))
    assert needs_annotations(routing("answer", contrast_context="reflection"))
    assert not needs_annotations(routing("answer", contrast_context="solution"))


def test_the_same_example_without_rollouts_has_an_empty_table(example):
    made = example({"text": "2", "correct": None})
    assert made.routed(routing("peer", contrast_context="wrong_peer", contrasts=2)) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"contrasts": 2, "contrast_context": "solution"}, "only contrast_context=wrong_peer"),
        ({"contrasts": 2}, "only contrast_context=wrong_peer"),
        ({"contrast_context": "solution", "key": "fkl", "error": "none"}, "the action reweight"),
        ({"contrast_context": "type", "teacher_context": "answer"}, "has to be a text or none"),
        ({"contrast_context": "answer", "teacher_context": "answer"}, "their gap is nil"),
    ],
)
def test_a_contrast_without_effect_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        RoutingConfig(**(ALL | fields))


def test_a_reweighted_row_without_its_contrast_is_no_table(example):
    made = example({"text": "2", "correct": True}, {"text": "3", "correct": False})
    tables = (made.problems, made.rollouts, made.verdicts, made.annotations, made.bytes)
    rows = routed_table(*tables, routing("answer", contrast_context="none")).to_pylist()
    validate(ROUTED.table(rows), ROUTED)
    for missing in (None, []):
        rows[1]["contrast_contexts"] = missing
        with pytest.raises(InputError, match="row 1: contrast_contexts is null or empty"):
            validate(ROUTED.table(rows), ROUTED)
