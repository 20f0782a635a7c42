"""Gates, signs, contrasts, scores and supports of the fused loss against the float64 twin."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import KlClip, Route, Signal
from trace_opd.tests.trace.test_fused import MIXED, assert_equals_twin, buffers
from trace_opd.tests.trace.twin import gradients, made_case, ours, shaped_log_softmax
from trace_opd.tests.trace.twin_options import drawn_options, scores_of, valid, with_options
from trace_opd.trace.losses import Scores


@settings(max_examples=300, deadline=None)
@given(
    routes=st.lists(st.sampled_from(Route), min_size=1, max_size=12)
    | st.lists(st.sampled_from([Route.GRPO, Route.FKL, Route.REWEIGHT]), min_size=1, max_size=12),
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(2, 9), st.integers(1, 6)),
    softcap=st.none() | st.floats(0.5, 30),
    masked=st.sampled_from([(0.0, 0.0), (0.4, 0.0), (0.0, 0.4), (0.3, 0.5)]),
    clip=st.sampled_from(KlClip),
    entropy_beta=st.sampled_from([0.0, 0.7]),
    lam=st.floats(0, 1),
    rows=st.tuples(st.integers(1, 6), st.integers(1, 4)),
)
def test_any_options_cut_in_any_chunks_equal_the_twin(
    routes, seed, shape, softcap, masked, clip, entropy_beta, lam, rows
):
    vocab, width = shape
    codes = [int(route) for route in routes]
    loss, options = drawn_options(random.Random(seed), codes)
    case = made_case(codes, seed, vocab, width, bias=True, softcap=softcap, masked=masked)
    config = valid(loss | {"kl_clip": clip, "entropy_beta": entropy_beta, "reweight_clip": 0.9})
    with buffers(*rows, vocab):
        assert_equals_twin(with_options(case, seed, **options), config, lam, w0=1.0)


def test_scores_of_the_vocabulary_equal_the_teacher_itself():
    """k = V is the full KL, with its gradients."""
    case = made_case([1, 0, 4, 1, 1, 4], vocab=9, temperature=1.0, bias=True, scale=3.0)
    log_q = shaped_log_softmax(
        case.teacher_hidden, case.teacher_head, torch.ones(len(case.teacher_hidden)).double()
    )
    logprobs, token_ids = log_q.sort(descending=True)
    sampled = log_q.gather(1, case.inputs.token_ids[case.inputs.route != 0, None]).squeeze(1)
    scores = Scores(token_ids, logprobs, torch.full((len(log_q),), -torch.inf).double(), sampled)
    scored = replace(case, inputs=replace(case.inputs, scores=scores))
    for clip in KlClip:
        config = LossConfig(kl_clip=clip, entropy_beta=0.7)
        expected, got = ours(case, config, 0.3, 0.4), ours(scored, config, 0.3, 0.4)
        for name, value in expected._asdict().items():
            assert_close(getattr(got, name), value, rtol=1e-10, atol=1e-12, msg=name)
        theirs = gradients(case, expected.loss)
        for name, gradient in gradients(scored, got.loss).items():
            assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("route", [Route.FKL, Route.RKL, Route.JSD])
def test_a_support_of_the_vocabulary_is_the_full_divergence(route):
    case = made_case([int(route)] * 4, vocab=9)
    full, all_of_it = LossConfig(), LossConfig(top_k=9)
    expected, got = ours(case, full, 0.3, 0.4), ours(case, all_of_it, 0.3, 0.4)
    assert_close(got.kl, expected.kl, rtol=1e-10, atol=1e-12)
    theirs, mine = gradients(case, expected.loss), gradients(case, got.loss)
    for name, gradient in theirs.items():
        assert_close(mine[name], gradient, rtol=1e-10, atol=1e-12)
    # Fewer entries see less: the others count as one.
    less = ours(case, LossConfig(top_k=2), 0.3, 0.4).kl
    assert (less < expected.kl).all()
    assert (less >= 0).all()


def test_scores_by_hand():
    """Teacher ½, ¼ and a tail of ¼; student ¼ each of four: D = ½ log 2 + ¼ log 1 + ¼ log ½."""
    logits = torch.zeros(1, 4).double().requires_grad_()
    case = made_case([1], vocab=4, width=4, temperature=1.0, advantage=0.0)
    scores = Scores(
        torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).double().log(),
        torch.tensor([0.25]).double().log(),
    )  # fmt: skip
    inputs = replace(
        case.inputs, scores=scores, weight=torch.ones(1).double(), reference_logprobs=None
    )
    head = replace(case.head, weight=torch.eye(4).double())
    out = ours(replace(case, hidden=logits, head=head, inputs=inputs), LossConfig(), 1.0, 0.0)
    half = torch.tensor(2.0).double().log()
    assert_close(out.kl[0], 0.25 * half)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    # p − q on the teacher's tokens; elsewhere p (1 − q_R / p_R) = ¼ (1 − ½).
    assert_close(gradient, torch.tensor([[0.0, 0.125, -0.25, 0.125]]).double())


def test_a_student_sure_of_the_scores_has_a_finite_loss_in_float32():
    """p_R far below float32's resolution of 1 − Σ p keeps its gradient of q_R at most."""
    logits = torch.tensor([[60.0, 0.0, 0.0, -3.0]]).requires_grad_()
    case = made_case([1], vocab=4, width=4, temperature=1.0, advantage=0.0).to(torch.float32)
    scores = Scores(
        torch.tensor([[0]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]).log()
    )  # fmt: skip
    inputs = replace(case.inputs, scores=scores, weight=torch.ones(1), reference_logprobs=None)
    head = replace(case.head, weight=torch.eye(4))
    out = ours(replace(case, hidden=logits, head=head, inputs=inputs), LossConfig(), 1.0, 0.0)
    log_rest = torch.tensor([0.0, 0.0, -3.0]).logsumexp(0) - 60
    expected = 0.9 * torch.tensor(0.9).log() + 0.1 * (torch.tensor(0.1).log() - log_rest)
    assert_close(out.kl[0], expected)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert_close(gradient.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(gradient[0, 0], torch.tensor(0.1))


def test_a_negative_weight_ascends_the_divergence():
    """AntiSD: the gradient of jsd with the other sign, and none below the teacher-entropy gate."""
    case = made_case([3] * 5, bias=True, advantage=0.0)
    case = replace(case, inputs=replace(case.inputs, reference_logprobs=None))
    down = ours(case, LossConfig(), 0.5, 0.0)
    negative = replace(case.inputs, kl_scale=torch.full((5,), -1.0).double())
    up = ours(replace(case, inputs=negative), LossConfig(), 0.5, 0.0)
    theirs, mine = gradients(case, down.loss), gradients(case, up.loss)
    for name, gradient in theirs.items():
        assert gradient.norm() > 0
        assert_close(mine[name], -gradient)
    assert_close(up.loss, -down.loss)
    gate = GateConfig(of=Signal.TEACHER_ENTROPY, shape="above", at=1e6)
    shut = ours(case, LossConfig(gates=[gate]), 0.5, 0.0)
    assert all(not gradient.any() for gradient in gradients(case, shut.loss).values())
    assert not shut.gate.any()
    # Tokens above the median alone are taught.
    entropies = shut.teacher_entropy
    middle = GateConfig(of=Signal.TEACHER_ENTROPY, shape="above", at=float(entropies.median()))
    some = ours(case, LossConfig(gates=[middle]), 0.5, 0.0)
    assert_close(some.gate, (entropies >= entropies.median()).double())
    taught = gradients(case, some.loss)["hidden"].abs().sum(-1) > 0
    assert torch.equal(taught, entropies >= entropies.median())


def test_a_weight_of_zero_leaves_nothing_of_the_divergence():
    case = made_case([1, 2, 3], advantage=0.0)
    inputs = replace(case.inputs, kl_scale=torch.zeros(3).double(), reference_logprobs=None)
    out = ours(replace(case, inputs=inputs), LossConfig(), 0.5, 0.0)
    assert out.loss == 0
    assert out.kl.all()


def test_a_hot_teacher_is_nearer_to_uniform():
    case = made_case([1] * 3, temperature=1.0)
    config = LossConfig(entropy_beta=1e-9)  # reads the teacher's entropy
    cool, hot = (ours(replace(case, teacher_temperature=t), config, 0.5, 0.5) for t in (None, 1e6))
    assert_close(hot.teacher_entropy, torch.full((3,), 7.0).double().log())
    assert (cool.teacher_entropy < hot.teacher_entropy).all()
    same = ours(replace(case, teacher_temperature=1.0), config, 0.5, 0.5)
    assert_close(same.loss, cool.loss)


def test_gspo_weighs_a_sequence_by_its_mean():
    """Two sequences with log-ratios (0.4, 0) and (−0.2): their tokens have ratios e^0.2, e^−0.2."""
    case = made_case([0, 0, 0], temperature=1.0, advantage=1.0)
    own = ours(case, LossConfig(), 0.0, 1.0).logprobs
    inputs = replace(
        case.inputs,
        old_logprobs=own - torch.tensor([0.4, 0.0, -0.2]).double(),
        sequence=torch.tensor([0, 0, 1]),
        weight=torch.ones(3).double(),
        reference_logprobs=None,
    )
    config = LossConfig(policy="gspo", clip_low=0.5, clip_high=0.5)
    out = ours(replace(case, inputs=inputs), config, 0.0, 1.0)
    assert_close(out.loss, -(2 * torch.tensor(0.2).double().exp() + torch.tensor(-0.2).exp()))
    clipped = ours(replace(case, inputs=inputs), LossConfig(policy="gspo"), 0.0, 1.0)
    assert clipped.ratio_clipped.tolist() == [0, 0, 0]  # e^0.2 < 1.28, though e^0.4 is not
    assert ours(replace(case, inputs=inputs), LossConfig(), 0.0, 1.0).ratio_clipped.tolist() == [
        1, 0, 0,
    ]  # fmt: skip


def test_what_scores_cannot_teach_is_refused():
    case = made_case([1, 2, 4])
    scored = replace(case, inputs=replace(case.inputs, scores=scores_of(case, 3)))
    with pytest.raises(InputError, match=r"teacher\.scores: tokens are routed to rkl, .* fkl"):
        ours(scored, LossConfig(), 0.3, 0.4)
    ours(scored, LossConfig(), 0.0, 1.0)  # no teacher at all
    mute = made_case([1, 4])
    scores = replace(scores_of(mute, 3), sampled=None)
    with pytest.raises(InputError, match="the action reweight needs the teacher's"):
        ours(replace(mute, inputs=replace(mute.inputs, scores=scores)), LossConfig(), 0.3, 0.4)
    alone = made_case([1])
    with pytest.raises(InputError, match="scores have their own k"):
        ours(
            replace(alone, inputs=replace(alone.inputs, scores=scores_of(alone, 3))),
            LossConfig(top_k=2), 0.3, 0.4,
        )  # fmt: skip


@pytest.mark.parametrize("signal", [Signal.DIVERGENCE, Signal.IMPORTANCE])
def test_a_reweighted_token_has_no_divergence_for_a_gate(signal):
    config = LossConfig(gates=[GateConfig(of=signal, shape="above", at=0.1)])
    with pytest.raises(InputError, match=r"loss\.gates: .* action reweight"):
        ours(made_case(MIXED), config, 0.3, 0.4)
    ours(made_case([1, 2, 0]), config, 0.3, 0.4)
