"""The fused objective's sums and memory, against the same pass in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trace_opd.schemas.configs import LossConfig
from trace_opd.trace import fused_torch
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs, LossOutput

ROUTES = [0, 1, 0, 2, 0, 3, 0, 4]
LOSS = LossConfig(reference_kl=0.1)
DOUBLE, BFLOAT16 = torch.float64, torch.bfloat16


@dataclass(frozen=True)
class Run:
    """One pass, and the tensors that receive its gradients."""

    output: LossOutput
    hidden: torch.Tensor
    weight: torch.Tensor


def run(states: torch.dtype, weights: torch.dtype, tokens: int, vocab: int, width: int = 16) -> Run:
    """The same values, exact in bfloat16, in the given dtypes."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.promote_types(states, torch.float32)

    def normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    hidden, weight = normal(states, tokens, width), normal(weights, vocab, width)
    route = torch.tensor((ROUTES * tokens)[:tokens], dtype=torch.uint8)
    inputs = LossInputs(
        token_ids=torch.randint(vocab, (tokens,), generator=generator),
        old_logprobs=normal(rest, tokens) - 4,
        advantage=normal(rest, tokens),
        weight=torch.full((tokens,), 1 / 64, dtype=rest),
        temperature=torch.full((tokens,), 0.75, dtype=rest),
        route=route,
        reference_logprobs=normal(rest, tokens) - 4,
    )
    taught = normal(states, int((route != 0).sum()), width)
    head, teacher = Head(weight, normal(weights, vocab), 30.0), Head(normal(weights, vocab, width))
    hidden.requires_grad_()
    weight.requires_grad_()
    return Run(routed_loss(hidden, head, inputs, LOSS, 0.3, 0.4, taught, teacher), hidden, weight)


@contextmanager
def buffers(rows: int, block: int, vocab: int) -> Iterator[None]:
    """Buffers of `rows` rows of float32 logits, processed in blocks of `block`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("BUFFER_BYTES", rows), ("BLOCK_BYTES", block)):
            patch.setitem(getattr(fused_torch, name), "cpu", 4 * count * vocab)
        yield


@pytest.mark.parametrize(
    ("states", "weights", "rounding"),
    [
        # bfloat16 rounds logits to 8 bits; everything after them is float32.
        (BFLOAT16, BFLOAT16, 0.02),
        (BFLOAT16, torch.float32, 0.02),
        (torch.float32, torch.float32, 1e-5),
    ],
)
def test_loss_and_gradients_are_float64s_within_the_states_rounding(states, weights, rounding):
    low, exact = run(states, weights, 64, 40), run(DOUBLE, DOUBLE, 64, 40)
    assert {column.dtype for column in low.output} == {torch.float32}
    low.output.loss.backward()
    exact.output.loss.backward()
    assert (low.hidden.grad.dtype, low.weight.grad.dtype) == (states, weights)
    for mine, expected in (
        (low.output.loss, exact.output.loss),
        (low.output.entropy, exact.output.entropy),
        (low.hidden.grad, exact.hidden.grad),
        (low.weight.grad, exact.weight.grad),
    ):
        assert (mine.double() - expected).norm() < rounding * expected.norm()


def test_the_heads_gradient_is_summed_in_float32_whatever_the_states_are():
    """4,000 equal tokens, two at a time: a sum in bfloat16 would stop growing early."""
    tokens, vocab = 4000, 8
    hidden = torch.ones(tokens, 4, dtype=BFLOAT16)
    weight = torch.zeros(vocab, 4, dtype=torch.float32).requires_grad_()
    ones = torch.ones(tokens)
    inputs = LossInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        old_logprobs=-ones * torch.tensor(float(vocab)).log(),
        advantage=ones,
        weight=ones,
        temperature=ones,
        route=torch.zeros(tokens, dtype=torch.uint8),
    )
    with buffers(2, 2, vocab):
        routed_loss(hidden, Head(weight), inputs, LossConfig()).loss.backward()
    # d(−ρ)/dlogits = p − onehot at ρ = 1: −7/8 for the token, 1/8 elsewhere, times the state.
    assert weight.grad[:, 0].tolist() == [-3500.0, *[500.0] * (vocab - 1)]


class Made(TorchDispatchMode):
    """Records the shapes of the tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.shapes)


@pytest.mark.parametrize("states", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("tokens", [300, 1500])
def test_no_tensor_is_larger_than_the_buffer_however_many_the_tokens(states, tokens):
    vocab, rows, width = 512, 32, 4
    with buffers(rows, 8, vocab), Made() as made:
        run(states, torch.float32, tokens, vocab, width).output.loss.backward()
    assert max(tokens, vocab) * width < rows * vocab  # states and head are smaller
    assert made.largest == rows * vocab
