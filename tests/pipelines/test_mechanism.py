"""One optimiser step, looked at closely."""

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.study.mechanism import OBJECTIVES, one_step


def test_a_step_brings_the_student_nearer_to_the_right_teacher_and_lifts_what_it_supports():
    rows = one_step(resolve_policy("micro"), lr=1e-4, problems=4, seed=0)
    assert [row["objective"] for row in rows] == list(OBJECTIVES)
    # All objectives start from the same rollouts.
    assert len({(row["key_tokens"], row["supported_tokens"]) for row in rows}) == 1
    assert 0 < rows[0]["supported_tokens"] < rows[0]["key_tokens"]
    unclipped = rows[-1]
    assert unclipped["objective"] == "trace-fkl, clip none"
    assert unclipped["lift"] > 0
    assert unclipped["to_right"] < 0


def test_the_literal_clip_changes_what_a_step_does():
    rows = {row["objective"]: row for row in one_step(resolve_policy("micro"), 1e-4, 4, 1)}
    assert rows["trace-fkl, clip entry_above"]["lift"] != rows["trace-fkl, clip none"]["lift"]
