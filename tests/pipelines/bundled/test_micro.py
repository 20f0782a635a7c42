"""The bundled policy: right about half the time, and the label changes its teacher."""

from typing import Any

import pytest

from trace_opd.pipelines.bundled.micro import arithmetic_problems
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.study.mechanism import label_effect
from trace_opd.schemas.contract import validate
from trace_opd.schemas.tables import PROBLEMS
from trace_opd.trace.policy import load_policy


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    policy = load_policy(resolve_policy("micro"), "cpu")
    return label_effect(policy, arithmetic_problems(64, seed=0), seed=0)


def test_problems_are_distinct_additions_that_fit_the_contract():
    table = validate(arithmetic_problems(100, seed=0), PROBLEMS)
    assert len(set(table["problem"].to_pylist())) == 100
    for row in table.to_pylist():
        left, right = row["problem"].split("+")
        assert int(left) + int(right) == int(row["answer"])
        assert 3 <= len(left) <= 5


def test_the_base_pass_rate_leaves_room_on_both_sides(figures):
    assert figures["rollouts"] == 64 * 8
    assert 0.3 <= figures["pass_rate"] <= 0.6


def test_on_key_spans_the_right_label_moves_the_teacher_and_another_does_not(figures):
    key = figures["key"]
    assert key["tokens"] > 1000
    assert key["right_label"] > 10 * key["wrong_label"]
    assert key["right_to_wrong"] > 5 * key["uninformative"]


def test_on_error_spans_the_right_label_moves_the_teacher_more_than_another(figures):
    error = figures["error"]
    assert error["tokens"] > 1000
    assert error["right_label"] > 1.5 * error["wrong_label"]
