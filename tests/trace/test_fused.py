"""The fused objective against a float64 twin: full logits, token by token, PyTorch's autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.tests.trace.twin import Case, gradients, made_case, ours, twin
from trace_opd.trace import fused_torch
from trace_opd.trace.fused import token_logprobs
from trace_opd.trace.losses import FLOOR, Head

MIXED = [3, 0, 4, 1, 2, 0, 3, 2, 1, 4, 0, 1]


def assert_equals_twin(case: Case, config: LossConfig, lam: float, w0: float = 0.5) -> None:
    fade = 1 - lam / w0
    expected, got = twin(case, config, lam, fade), ours(case, config, lam, fade)
    for name, value in expected._asdict().items():
        assert_close(getattr(got, name), value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)
    theirs, mine = gradients(case, expected.loss), gradients(case, got.loss)
    for name, value in theirs.items():
        assert_close(mine[name], value, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: n + m)


@contextmanager
def buffers(rows: int, block: int, vocab: int) -> Iterator[None]:
    """Buffers of `rows` rows of logits, processed in blocks of `block`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("BUFFER_BYTES", rows), ("BLOCK_BYTES", block)):
            patch.setitem(getattr(fused_torch, name), "cpu", 8 * count * vocab)
        yield


OPTIONS = {
    "plain": {},
    "jsd near the teacher": {"jsd_beta": 0.1},
    "jsd near the student": {"jsd_beta": 0.9},
    "entropy weight": {"entropy_beta": 1.5},
    "no grpo": {"grpo": False},
    "truncated importance": {"truncated_importance": 1.1},
    "reference kl": {"reference_kl": 0.3},
    "reweight far": {"reweight_clip": 0.9},
    "other bounds": {"kl_clip_value": 0.5, "clip_low": 0.02, "clip_high": 0.03},
    "all at once": {
        "jsd_beta": 0.3, "entropy_beta": 0.7, "truncated_importance": 0.9, "reference_kl": 0.2,
    },
}  # fmt: skip
LAYOUTS = {
    "all kinds in any order": MIXED,
    "all routed": [2, 3, 1, 4, 1],
    "none routed": [0] * 5,
    "one plain token": [0],
    "one routed token": [3],
}


@pytest.mark.parametrize("clip", list(KlClip))
@pytest.mark.parametrize("routes", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_equals_the_twin(options, routes, clip):
    config = LossConfig(kl_clip=clip, **options)
    for lam in (0.0, 0.2, 0.5):
        assert_equals_twin(made_case(routes), config, lam)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("temperature", [None, 0.6, 1.0])
def test_bias_softcap_and_temperature_equal_the_twin(bias, softcap, temperature):
    case = made_case(MIXED, bias=bias, softcap=softcap, temperature=temperature, scale=3.0)
    assert_equals_twin(case, LossConfig(), 0.3)
    assert_close(
        token_logprobs(case.hidden, case.head, case.inputs.token_ids, case.inputs.temperature),
        ours(case, LossConfig(), 0.3, 0.4).logprobs,
    )


@pytest.mark.parametrize("truncated", [None, 1.2])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-30.0, -1.5, 1.5, 30.0])
def test_ratios_far_from_1_equal_the_twin(log_ratio, advantage, truncated):
    case = made_case(MIXED, log_ratio=log_ratio, advantage=advantage)
    assert_equals_twin(case, LossConfig(truncated_importance=truncated), 0.2)


CONFIGS = st.builds(
    LossConfig,
    grpo=st.booleans(),
    clip_low=st.floats(0.01, 0.5),
    clip_high=st.floats(0.01, 0.5),
    truncated_importance=st.none() | st.floats(0.5, 2),
    reference_kl=st.sampled_from([0.0, 0.3]),
    kl_clip=st.sampled_from(KlClip),
    kl_clip_value=st.floats(0.01, 1),
    jsd_beta=st.floats(0.05, 0.95),
    entropy_beta=st.floats(0, 2),
    reweight_clip=st.floats(0.05, 0.9),
)


@settings(max_examples=150, deadline=None)
@given(
    routes=st.lists(st.sampled_from(Route), min_size=1, max_size=12),
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(2, 9), st.integers(1, 6)),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 30),
    lam=st.floats(0, 1),
    config=CONFIGS,
    rows=st.tuples(st.integers(1, 6), st.integers(1, 4)),
)
def test_any_case_cut_in_any_chunks_equals_the_twin(
    routes, seed, shape, bias, softcap, lam, config, rows
):
    vocab, width = shape
    case = made_case([int(r) for r in routes], seed, vocab, width, bias, softcap)
    with buffers(*rows, vocab):
        assert_equals_twin(case, config, lam, w0=1.0)


def test_gradcheck():
    config = LossConfig(entropy_beta=0.5, reference_kl=0.1)
    case = made_case(MIXED, vocab=4, width=2, bias=True, softcap=5.0)

    class Repeatable(torch.autograd.Function):
        """gradcheck asks for a gradient many times; the fused pass gives it only once."""

        @staticmethod
        def forward(ctx: Any, *variables: torch.Tensor):
            ctx.save_for_backward(*variables)
            return loss_at(*variables)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor):
            variables = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                loss = loss_at(*variables)
            return torch.autograd.grad(loss, variables, grad_outputs[0])

    def loss_at(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        at = replace(case, hidden=hidden, head=Head(weight, bias, 5.0))
        return ours(at, config, 0.3, 0.4).loss

    variables = tuple(x.detach().requires_grad_() for x in case.variables.values())
    assert torch.autograd.gradcheck(Repeatable.apply, variables)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [1, 2, 7])
def test_small_buffers_change_nothing(rows, block):
    case = made_case(MIXED * 3, bias=True, softcap=4.0)
    at_once = ours(case, LossConfig(), 0.3, 0.4)
    with buffers(rows, block, vocab=7):
        cut = ours(case, LossConfig(), 0.3, 0.4)
    for one, other in zip(at_once, cut, strict=True):
        assert_close(one, other, rtol=1e-13, atol=1e-14)
    expected, got = gradients(case, at_once.loss), gradients(case, cut.loss)
    for name, gradient in expected.items():
        assert_close(got[name], gradient, rtol=1e-12, atol=1e-14)


# --- masked entries ---

MASKS = {"student's": (0.4, 0.0), "teacher's": (0.0, 0.4), "both": (0.3, 0.5)}


@pytest.mark.parametrize("clip", list(KlClip))
@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", [{}, {"entropy_beta": 0.7, "truncated_importance": 1.1}])
def test_masked_entries_equal_the_twin(masked, options, clip):
    config = LossConfig(kl_clip=clip, reference_kl=0.1, **options)
    for seed, temperature in ((0, None), (1, 1.0)):
        case = made_case(MIXED, seed, vocab=9, temperature=temperature, masked=masked)
        assert_equals_twin(case, config, 0.3)
        got = ours(case, config, 0.3, 0.4)
        assert all(column.isfinite().all() for column in got)
        assert all(grad.isfinite().all() for grad in gradients(case, got.loss).values())


def test_a_masked_token_has_the_floors_log_probability():
    case = made_case([0, 0], vocab=4, temperature=1.0)
    bias = torch.zeros(4).double()
    bias[case.inputs.token_ids[0]] = -torch.inf
    case = replace(case, head=Head(case.head.weight, bias.requires_grad_()))
    scored = token_logprobs(case.hidden, case.head, case.inputs.token_ids, case.inputs.temperature)
    assert scored[0] == ours(case, LossConfig(), 0.0, 1.0).logprobs[0] == FLOOR


# --- which gradients ---


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)))
def test_only_requested_gradients_are_computed(wanted):
    full = made_case(MIXED, bias=True)
    expected = gradients(full, ours(full, LossConfig(), 0.3, 0.4).loss)
    case = made_case(MIXED, bias=True)
    for variable, keep in zip((case.hidden, case.head.weight, case.head.bias), wanted, strict=True):
        variable.requires_grad_(keep)
    loss = ours(case, LossConfig(), 0.3, 0.4).loss
    assert loss.requires_grad is any(wanted)
    if any(wanted):
        for name, gradient in gradients(case, loss).items():
            assert torch.equal(gradient, expected[name])


def test_without_gradients_the_numbers_are_the_same():
    case = made_case(MIXED, bias=True)
    with torch.no_grad():
        evaluated = ours(case, LossConfig(), 0.3, 0.4)
    assert not evaluated.loss.requires_grad
    for one, other in zip(evaluated, ours(case, LossConfig(), 0.3, 0.4), strict=True):
        assert torch.equal(one, other)


def test_a_scaled_loss_scales_its_gradients():
    case = made_case(MIXED, bias=True)
    plain = gradients(case, ours(case, LossConfig(), 0.3, 0.4).loss)
    scaled = gradients(case, 3 * ours(case, LossConfig(), 0.3, 0.4).loss)
    for name, gradient in plain.items():
        assert_close(scaled[name], 3 * gradient)


def test_a_second_backward_pass_is_refused():
    case = made_case(MIXED)
    loss = ours(case, LossConfig(), 0.3, 0.4).loss
    torch.autograd.grad(loss, case.hidden, torch.tensor(2.0).double(), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, case.hidden)
