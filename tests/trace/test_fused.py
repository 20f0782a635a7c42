"""The fused objective against a float64 twin: full logits, token by token, PyTorch's autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.trace import fused_torch
from trace_opd.trace.fused import routed_loss, token_logprobs
from trace_opd.trace.losses import Head, LossInputs, LossOutput

MIXED = [3, 0, 4, 1, 2, 0, 3, 2, 1, 4, 0, 1]


@dataclass(frozen=True)
class Case:
    """A micro-batch and two heads; teacher_hidden has one row per routed token, in order."""

    hidden: torch.Tensor
    head: Head
    inputs: LossInputs
    teacher_hidden: torch.Tensor
    teacher_head: Head

    @property
    def variables(self) -> dict[str, torch.Tensor]:
        """The tensors that get gradients."""
        named = {"hidden": self.hidden, "weight": self.head.weight, "bias": self.head.bias}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}


def made_case(
    routes: list[int],
    seed: int = 0,
    vocab: int = 7,
    width: int = 4,
    bias: bool = False,
    softcap: float | None = None,
    temperature: float | None = None,
    log_ratio: float | None = None,
    advantage: float | None = None,
    scale: float = 1.0,
) -> Case:
    """Random float64 values; log_ratio and advantage fix those of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, routed = len(routes), sum(map(bool, routes))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head() -> Head:
        return Head(scale * normal(vocab, width), normal(vocab) if bias else None, softcap)

    student, teacher, hidden = head(), head(), normal(tokens, width)
    heat = torch.full((tokens,), temperature or 1.0).double()
    if temperature is None:
        heat = 0.5 + torch.rand(tokens, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocab, (tokens,), generator=generator)
    own = shaped_log_softmax(hidden, student, heat).gather(1, ids[:, None]).squeeze(1)
    for variable in (hidden, student.weight, student.bias):
        if variable is not None:
            variable.requires_grad_()
    inputs = LossInputs(
        token_ids=ids,
        old_logprobs=own - (0.3 * normal(tokens) if log_ratio is None else log_ratio),
        advantage=normal(tokens) if advantage is None else torch.full_like(own, advantage),
        weight=torch.rand(tokens, generator=generator, dtype=torch.float64),
        temperature=heat,
        route=torch.tensor(routes, dtype=torch.uint8),
        reference_logprobs=own + 0.3 * normal(tokens),
    )
    return Case(hidden, student, inputs, normal(routed, width), teacher)


# --- the twin ---


def shaped_log_softmax(hidden: torch.Tensor, head: Head, heat: torch.Tensor) -> torch.Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / heat[:, None], -1)


def twin(case: Case, config: LossConfig, lam: float, fade: float) -> LossOutput:
    """METHOD.md's objective with its baselines' options, one token after another."""
    x = case.inputs
    student = shaped_log_softmax(case.hidden, case.head, x.temperature)
    routed = x.route != 0
    teacher = iter(
        shaped_log_softmax(case.teacher_hidden, case.teacher_head, x.temperature[routed])
    )
    rows = []
    for t, log_p in enumerate(student):
        route, kl, exact, kl_clipped = Route(int(x.route[t])), 0.0, 0.0, False
        logprob, advantage, share = log_p[x.token_ids[t]], x.advantage[t], 1.0
        if route is not Route.GRPO:
            log_q = next(teacher)
            if lam > 0 and route is Route.REWEIGHT:
                log_evidence = torch.sign(advantage) * (log_q[x.token_ids[t]] - logprob.detach())
                eps = config.reweight_clip
                advantage = advantage * (1 - lam + lam * log_evidence.exp().clamp(1 - eps, 1 + eps))
            elif lam > 0:
                share = fade
                terms = divergence_terms(route, log_p, log_q, config.jsd_beta)
                entropy = -(log_q.exp() * log_q).sum()
                exact, kl_clipped = terms.sum(), clipped(terms, config) != terms.sum()
                kl = torch.exp(-config.entropy_beta * entropy) * clipped(terms, config)
        ratio = torch.exp(logprob - x.old_logprobs[t])
        if config.truncated_importance is None:
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            binds = bounded * advantage < ratio * advantage
        else:
            importance = ratio.detach().clamp(max=config.truncated_importance)
            gain = importance * advantage * torch.exp(logprob - logprob.detach())
            binds = ratio > config.truncated_importance
        loss = -share * gain * config.grpo + lam * kl
        to_base = torch.zeros(())
        if x.reference_logprobs is not None:
            log_r = x.reference_logprobs[t] - logprob
            to_base = log_r.exp() - log_r - 1
            loss = loss + config.reference_kl * to_base
        entropy = -(log_p.exp() * log_p).sum()
        rows.append((x.weight[t] * loss, logprob, entropy, binds, exact, kl_clipped, to_base))
    loss, *statistics = (
        torch.stack([torch.as_tensor(v).double() for v in c]) for c in zip(*rows, strict=True)
    )
    return LossOutput(loss.sum(), *(column.detach() for column in statistics))


def divergence_terms(
    route: Route, log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    if route is Route.FKL:
        return q * (log_q - log_p)
    if route is Route.RKL:
        return p * (log_p - log_q)
    log_m = torch.log(beta * q + (1 - beta) * p)
    return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)


def clipped(terms: torch.Tensor, config: LossConfig) -> torch.Tensor:
    bound = config.kl_clip_value
    if config.kl_clip == KlClip.ENTRY_ABOVE:
        return terms.clamp(max=bound).sum()
    if config.kl_clip == KlClip.ENTRY_SYMMETRIC:
        return terms.clamp(-bound, bound).sum()
    return terms.sum().clamp(max=bound) if config.kl_clip == KlClip.TOKEN else terms.sum()


# --- the comparison ---


def ours(case: Case, config: LossConfig, lam: float, fade: float) -> LossOutput:
    taught = (case.teacher_hidden, case.teacher_head) if lam > 0 else (None, None)
    return routed_loss(case.hidden, case.head, case.inputs, config, lam, fade, *taught)


def gradients(case: Case, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(case.variables.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(case.variables.items(), found, strict=True)
    }


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
