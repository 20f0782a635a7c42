"""Samples by problem and label, and the divergence per token against a slow one in float64."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.pipelines.bundled.micro import arithmetic_problems
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.probe import measure
from trace_opd.pipelines.probe.figures import figures
from trace_opd.pipelines.probe.measure import (
    Samples,
    asked_of,
    divergences,
    has_signal,
    per_row,
    places,
    sums,
    wrong_labels,
)
from trace_opd.pipelines.study.base_figures import base_figures
from trace_opd.pipelines.study.mechanism import PROMPT, label_effect, routed_rollouts
from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.labels import DiagnosticType, ErrorType, Route
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.policy_mask import POLICY_MASK
from trace_opd.trace.prompt import render_chat, teacher_messages

RIGHT, WRONG = DiagnosticType.CASE_ANALYSIS, DiagnosticType.ARITHMETIC


def samples(*rows: tuple[str, float, float]) -> Samples:
    """rows: problem, right, tokens."""
    problem, right, tokens = zip(*rows, strict=True)
    return Samples(np.array(problem, object), np.array(right), np.array(tokens), [""] * len(rows))


def test_a_problem_has_signal_with_right_and_wrong_samples():
    nan = np.nan
    rows = [("a", 1, 9), ("a", 0, 9), ("b", 1, 9), ("b", 1, 9), ("c", 0, 9), ("c", nan, 9)]
    own = samples(*rows, ("d", nan, 9))
    np.testing.assert_array_equal(has_signal(["a", "b", "c", "d"], own), [1, 0, 0, nan])
    assert sums(["c", "a"], own.problem, own.right).tolist() == [[0, 1], [1, 2]]


def test_a_row_has_the_mean_of_its_problem_under_its_label():
    taught = {
        RIGHT: samples(("a", 1, 4), ("a", 0, 6), ("b", 1, 8), ("b", np.nan, 10)),
        WRONG: samples(("a", 0, 5), ("a", 0, 5)),
    }
    rows = [("a", RIGHT), ("b", RIGHT), ("a", WRONG), ("a", RIGHT), ("b", WRONG)]
    means = per_row(rows, taught, lambda own: own.right)
    np.testing.assert_array_equal(means, [0.5, 1, 0, 0.5, np.nan])
    assert asked_of(rows) == {RIGHT: {"a", "b"}, WRONG: {"a", "b"}}


def test_a_wrong_label_is_another_of_its_enumeration():
    setup, other = DiagnosticType.SETUP, DiagnosticType.OTHER
    assert wrong_labels([RIGHT, WRONG, RIGHT, other]) == [WRONG, RIGHT, WRONG, WRONG]
    alone = wrong_labels([setup, ErrorType.MISCOUNT, ErrorType.WRONG_SETUP])
    assert isinstance(alone[0], DiagnosticType)
    assert alone[0] not in (setup, other)
    assert alone[1:] == [ErrorType.WRONG_SETUP, ErrorType.MISCOUNT]


def test_figures_of_two_problems_by_hand():
    student = samples(("a", 1, 10), ("a", 0, 20), ("b", 0, 30), ("b", 0, 30))
    taught = {
        RIGHT: samples(("a", 1, 10), ("a", 1, 10), ("b", 1, 20), ("b", 0, 20)),
        WRONG: samples(("a", 0, 10), ("a", 0, 10), ("b", 0, 10), ("b", 0, 10)),
    }
    ids = ["a", "a", "b"]
    rows = {
        "right_label": [(one, RIGHT) for one in ids],
        "wrong_label": [(one, WRONG) for one in ids],
    }
    place = np.array([1, 0, 1, 2, 0, 0], np.uint8)  # rows of 2, 1 and 3 tokens
    right = np.array([4.0, 1.0, 2.0, 6.0, 2.0, np.nan])
    kl = {"right_label": right, "wrong_label": right / 2}
    found = figures(["a", "b"], student, rows, taught, place, [2, 1, 3], kl)
    values = {name: one.value for name, one in found.items()}
    assert values == pytest.approx(
        {
            "pass_rate": 0.25, "signal": 0.5, "tokens": 22.5,
            "right_label_pass_rate": 0.75, "right_label_tokens": 15,
            "wrong_label_pass_rate": 0, "wrong_label_tokens": 10,
            "right_label_key": 3, "right_label_error": 6, "right_label_spans": 4,
            "right_label_elsewhere": 1.5,
            "wrong_label_key": 1.5, "wrong_label_error": 3, "wrong_label_spans": 2,
            "wrong_label_elsewhere": 0.75,
            "right_label_gain": 0.5, "right_label_length": 30 / 45,
            "spans_right_to_wrong": 2, "elsewhere_to_spans": 1.5 / 4,
        }
    )  # fmt: skip
    # Resamples of two problems draw one of them alone: a has 0.5 right, b none.
    assert (found["pass_rate"].low, found["pass_rate"].high) == (0, 0.5)
    assert found["right_label_gain"].low == found["right_label_gain"].high == 0.5


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@pytest.fixture(scope="module")
def routed(policy) -> pa.Table:
    """Eight labelled rows of two problems, half of them sampled at temperature 0.5."""
    routing = RoutingConfig(alpha=1.0, key=Route.FKL, error=Route.RKL)
    table = routed_rollouts(policy, arithmetic_problems(2, 1), routing, 64, 1).slice(4, 8)
    heat = pa.array([1.0, 0.5] * 4, table.schema.field("temperature").type)
    return table.set_column(table.column_names.index("temperature"), "temperature", heat)


def naive(policy: Policy, routed: pa.Table, label: DiagnosticType) -> np.ndarray:
    """The same divergence, a response at a time, by the model's own forward pass."""
    found = []
    for row in routed.to_pylist():
        teacher = render_chat(
            policy.tokenizer, teacher_messages(PROMPT, row["problem"], label, None)
        )
        logs = []
        for prompt in (teacher, row["prompt_token_ids"]):
            ids = torch.tensor([[*prompt, *row["token_ids"]]])
            with torch.no_grad():
                logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            logs.append(torch.log_softmax(logits / row["temperature"], -1))
        q, p = logs
        found.append((q.exp() * (q - p)).sum(-1).numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("small", [False, True])
def test_the_divergence_is_that_of_whole_distributions(policy, routed, monkeypatch, small):
    if small:  # a pass per response or two, and chunks of three tokens
        monkeypatch.setattr(measure, "_PASS_TOKENS", 100)
        monkeypatch.setattr(measure, "_LOGITS", 3 * len(policy.tokenizer))
    expected = [naive(policy, routed, label) for label in (RIGHT, WRONG)]
    found = divergences(policy, routed, [[RIGHT] * 8, [WRONG] * 8], PROMPT)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found.shape == (2, len(places(routed)))
    assert found[0].max() > 0.1


def test_tokens_that_the_policy_did_not_write_have_no_divergence(policy, routed):
    lengths = [len(ids) for ids in routed["token_ids"].to_pylist()]
    masks = [[index % 3 != 0 for index in range(length)] for length in lengths]
    masked = routed.append_column(POLICY_MASK, pa.array(masks, pa.list_(pa.bool_())))
    (found,) = divergences(policy, masked, [[RIGHT] * 8], PROMPT)
    (whole,) = divergences(policy, routed, [[RIGHT] * 8], PROMPT)
    written = np.concatenate([np.array(mask) for mask in masks])
    assert np.isnan(found[~written]).all()
    np.testing.assert_allclose(found[written], whole[written], rtol=1e-4, atol=1e-6)


def test_a_base_s_figures_agree_with_the_effect_of_the_label(policy):
    problems = arithmetic_problems(4, 2)
    figures, effect = base_figures(policy, problems, 128, 2), label_effect(policy, problems, 2)
    assert figures["pass_rate"] == pytest.approx(effect["pass_rate"])
    for label in ("right_label", "wrong_label"):
        for kind in ("key", "error"):
            assert figures[f"{label}_{kind}"] == pytest.approx(effect[kind][label], rel=1e-3)
