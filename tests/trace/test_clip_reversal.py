"""The gradient of a clipped forward KL, with the numbers of docs/decisions/kl-clip.md.

Where the clip of entries binds, the gradient of the logits is reversed and not lost: proposition 1
of arXiv 2609.38995.
"""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs

BOUND = 0.05


def kl_and_gradient(
    q: list[float], p: list[float], clip: KlClip = KlClip.ENTRY_ABOVE
) -> tuple[float, torch.Tensor]:
    """The KL of one routed token and its gradient in the student's logits, (vocab,), by the loss
    that trains: λ is 1, and GRPO's weight 0.

    With an identity as the head the hidden state is the logits.
    """
    vocab = len(q)
    logits = torch.tensor([p], dtype=torch.float64).log().requires_grad_()  # (1, vocab)
    teacher = torch.tensor([q], dtype=torch.float64).log()
    head = Head(torch.eye(vocab, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    inputs = LossInputs(
        token_ids=torch.zeros(1, dtype=torch.int64),
        old_logprobs=logits.detach()[:, 0],
        advantage=torch.zeros_like(one),
        weight=one,
        temperature=one,
        route=torch.tensor([int(Route.FKL)], dtype=torch.uint8),
    )
    config = LossConfig(kl_clip=clip, kl_clip_value=BOUND)
    output = routed_loss(logits, head, inputs, config, 1.0, 0.0, teacher, head)
    (gradient,) = torch.autograd.grad(output.loss, logits)
    return output.loss.item(), gradient[0]


def close(*values: float):
    return pytest.approx(list(values), abs=5e-4)


def test_two_tokens():
    q, p = [0.9, 0.1], [0.5, 0.5]
    exact, gradient = kl_and_gradient(q, p, KlClip.NONE)
    assert exact == pytest.approx(0.368, abs=5e-4)
    assert gradient.tolist() == close(-0.4, 0.4)
    clipped, gradient = kl_and_gradient(q, p)
    assert clipped == pytest.approx(-0.111, abs=5e-4)
    assert gradient.tolist() == close(0.05, -0.05)


def test_descent_on_the_clipped_kl_of_two_tokens_takes_the_teacher_s_token_away():
    logits = torch.zeros(2, dtype=torch.float64)
    for _ in range(2000):
        value, gradient = kl_and_gradient([0.9, 0.1], logits.softmax(0).tolist())
        logits -= gradient
    assert logits.softmax(0)[0] < 0.01
    assert value == pytest.approx(BOUND + 0.1 * log(0.1), abs=2e-3)
    assert value == pytest.approx(-0.180, abs=2e-3)


def test_three_tokens():
    """The second token is reversed too, though the clip does not bind there: 0.3 < 0.5 < 0.75."""
    q, p = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]
    assert kl_and_gradient(q, p, KlClip.NONE)[1].tolist() == close(-0.4, 0.2, 0.2)
    assert kl_and_gradient(q, p)[1].tolist() == close(0.08, -0.10, 0.02)


positive = st.floats(0.01, 1)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=6))
def test_the_gradient_of_any_clipped_kl(pairs):
    weights = torch.tensor(pairs, dtype=torch.float64)
    q, p = (weights / weights.sum(0)).T  # (vocab,)
    active = q * (q / p).log() <= BOUND
    mass = q[active].sum()
    expected = mass * p - torch.where(active, q, 0.0)
    gradient = kl_and_gradient(q.tolist(), p.tolist())[1]
    assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert (gradient[~active] > 0).all()  # without the clip p − q < 0
