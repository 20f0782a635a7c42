"""The effect of one optimiser step."""

import pyarrow as pa
import pytest

from trace_opd.pipelines.bundled.micro import arithmetic_problems
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.study.mechanism import (
    OBJECTIVES,
    PROMPT,
    has_key_tokens,
    kinds_in_use,
    one_step,
    other_kind,
    routed_rollouts,
)
from trace_opd.schemas.configs import RoutingConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import DiagnosticType, Route
from trace_opd.schemas.settings import override
from trace_opd.trace.policy import load_policy

CONFIG = TrainConfig.model_validate(
    {
        "policy": {"path": "micro"},
        "prompt": PROMPT,
        "online": {"steps": 1},
        "optim": {"lr": 1e-4},
    }
)


def test_a_wrong_label_is_a_meaningful_type_of_the_same_rollouts():
    used = [DiagnosticType.ARITHMETIC, DiagnosticType.CASE_ANALYSIS]
    table = pa.table({"diagnostic_type": ["case_analysis", None, "arithmetic", "other"]})
    assert kinds_in_use(table) == used
    assert other_kind(used, DiagnosticType.CASE_ANALYSIS) is DiagnosticType.ARITHMETIC
    assert other_kind(used, DiagnosticType.ARITHMETIC) is DiagnosticType.CASE_ANALYSIS
    assert other_kind(used, DiagnosticType.OTHER) is DiagnosticType.ARITHMETIC
    assert kinds_in_use(table.slice(0, 2)) == list(DiagnosticType)


def rows(seed, action=Route.FKL):
    policy = load_policy(resolve_policy("micro"), "cpu")
    routing = RoutingConfig(key=action, error=Route.GRPO)
    routed = routed_rollouts(policy, arithmetic_problems(4, seed), routing, 96, seed)
    return one_step(override(CONFIG, [f"seed={seed}"]), routed)


def test_a_step_brings_the_student_nearer_to_the_right_teacher_and_lifts_what_it_supports():
    found = rows(0)
    assert [row["objective"] for row in found] == list(OBJECTIVES)
    # All objectives start from the same rollouts.
    assert len({(row["key_tokens"], row["supported_tokens"]) for row in found}) == 1
    assert 0 < found[0]["supported_tokens"] < found[0]["key_tokens"]
    unclipped = found[-1]
    assert unclipped["objective"] == "trace-fkl, clip none"
    assert unclipped["lift"] > 0
    assert unclipped["to_right"] < 0


def test_the_literal_clip_changes_what_a_step_does():
    found = {row["objective"]: row for row in rows(1)}
    assert found["trace-fkl, clip entry_above"]["lift"] != found["trace-fkl, clip none"]["lift"]


def test_rollouts_without_key_tokens_are_known():
    policy = load_policy(resolve_policy("micro"), "cpu")
    for action, has in ((Route.FKL, True), (Route.GRPO, False)):
        routing = RoutingConfig(key=action, error=Route.GRPO)
        routed = routed_rollouts(policy, arithmetic_problems(2, 0), routing, 96, 0)
        assert has_key_tokens(routed) is has


def test_rollouts_without_key_tokens_are_refused():
    with pytest.raises(InputError, match="FKL route"):
        rows(0, action=Route.GRPO)
