"""Each way of a packed row's attention against each sequence alone, and the choice of the way."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from trace_opd.trace import attention
from trace_opd.trace.attention import BUCKET, WAYS, Layout, Way, choose_way
from trace_opd.trace.packing import PackedModel, pack
from trace_opd.trace.policy import checkpoint_layers

from .test_packing import MODELS, ROWS, alone, gradients_of, responses_of


def probabilities(q, k, queries, keys, causal, scale, window):
    """FlashAttention's, sequence by sequence: (its queries, its keys, (heads, queries, keys)).

    window: tokens to the left and right; −1: no bound. The last query is at the last key.
    """
    assert queries.dtype == keys.dtype == torch.int32
    for (first, end), (start, stop) in zip(
        pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True
    ):
        own, read = slice(first, end), slice(start, stop)
        scores = torch.einsum("qhd,khd->hqk", q[own], k[read]) * scale
        left, right = window if not causal else (window[0], 0)
        at = torch.arange(stop - start - (end - first), stop - start)[:, None]
        distance = at - torch.arange(stop - start)
        hidden = distance < -right
        if left >= 0:
            hidden |= distance > left
        yield own, read, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def forward(q, k, v, queries, keys, most_q, most_k, causal, scale, window, *_):
    assert (most_q, most_k) == (int(queries.diff().max()), int(keys.diff().max()))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = torch.empty_like(q)
    for own, read, p in probabilities(q, k, queries, keys, causal, scale, window):
        out[own] = torch.einsum("hqk,khd->qhd", p, v[read])
    return out, q.new_zeros(0), torch.zeros(2, dtype=torch.uint64)


def backward(grad, q, k, v, out, _, queries, keys, most_q, most_k, causal, rng, scale, window):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for own, read, p in probabilities(q, k, queries, keys, causal, scale, window):
        dv[read] = torch.einsum("hqk,qhd->khd", p, grad[own])
        dp = torch.einsum("qhd,khd->hqk", grad[own], v[read])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[own] = torch.einsum("hqk,khd->qhd", ds, k[read])
        dk[read] = torch.einsum("hqk,qhd->khd", ds, q[own])
    return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@pytest.fixture(scope="module")
def flash_on_cpu() -> None:
    """PyTorch's operators of variable-length attention, which need CUDA, computed plainly."""
    torch_varlen._varlen_attn.register_kernel("cpu")(forward)
    torch_varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def take(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose_way", lambda *_: way)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [ROWS["some share"], ROWS["prompts of their own"]], ids=str)
@pytest.mark.parametrize("name", ["llama", "windows in some layers", "longrope"])
@pytest.mark.parametrize("way", ["padded", "varlen"])
def test_every_way_gives_states_and_gradients_of_each_sequence_alone(
    way, name, rows, checkpointing, monkeypatch, flash_on_cpu
):
    take(way, monkeypatch)
    monkeypatch.setattr(attention, "BUCKET", 8)
    model = MODELS[name]().double()
    prompts, responses = [prompt for prompt, _ in rows], responses_of(rows)
    expected = alone(model, prompts, responses)
    gradients = gradients_of(model, expected)
    if checkpointing:
        checkpoint_layers(model)
    got = PackedModel(model)(pack(prompts, responses), lambda states, _: states)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    packed = gradients_of(model, got)
    assert packed.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert (packed[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


def states(heads: int, key_heads: int, tokens: int, dtype: torch.dtype) -> attention.States:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, tokens, 16, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, key_heads, key_heads)
    )
    return query, key, value


def test_padding_to_the_real_bucket_changes_nothing():
    layout = Layout([5, BUCKET - 6, 2, 3, BUCKET], [(0, 1), (0, 2), (3, 4)])
    own = states(4, 2, sum(layout.lengths), torch.float32)
    expected = WAYS["loop"](own, layout, None, None)
    torch.testing.assert_close(WAYS["padded"](own, layout, None, None), expected)


def test_grouped_keys_are_those_repeated():
    layout = Layout([5, 20], [(0, 1)])
    own = states(4, 2, 25, torch.bfloat16)
    repeated = attention.loop(own, layout, None, None)
    torch.testing.assert_close(attention.loop(own, layout, None, None, grouped=True), repeated)


def test_offsets_are_made_once_and_count_a_shared_prompts_queries_once():
    layout = Layout([3, 4, 5, 2, 6], [(0, 1), (0, 2), (3, 4)])
    device = torch.device("cpu")
    offsets = layout.offsets(device)
    assert offsets.queries.tolist() == [0, 7, 12, 20]
    assert offsets.keys.tolist() == [0, 7, 15, 23]
    assert (offsets.most_queries, offsets.most_keys) == (8, 8)
    assert layout.offsets(device) is offsets
    assert layout.shares
    assert not Layout([3, 4], [(0, 1)]).shares


@pytest.mark.parametrize(
    ("device", "flash", "tokens", "window", "way"),
    [
        ("cpu", True, [100] * 64, None, "loop"),
        ("cpu", False, [16_384], 4096, "loop"),
        ("cuda", True, [300] * 64, None, "varlen"),
        ("cuda", True, [16_384, 9000], None, "padded"),
        ("cuda", True, [16_384, *[500] * 8], None, "varlen"),
        ("cuda", True, [16_384], 4096, "varlen"),
        ("cuda", True, [16_384], 32_768, "padded"),
        ("cuda", False, [300] * 64, None, "padded"),
        ("cuda", False, [16_384], 4096, "padded"),
    ],
)
def test_the_way_depends_on_device_kernel_lengths_and_window(device, flash, tokens, window, way):
    assert choose_way(device, flash, tokens, window) == way


@pytest.mark.parametrize(
    ("dtype", "head", "value_head", "takes"),
    [
        (torch.bfloat16, 128, 128, True),
        (torch.float16, 256, 256, True),
        (torch.float32, 128, 128, False),
        (torch.bfloat16, 192, 128, False),
        (torch.bfloat16, 512, 512, False),
        (torch.bfloat16, 20, 20, False),
    ],
)
def test_flash_attentions_limits(dtype, head, value_head, takes):
    query, value = (torch.zeros(1, 1, 1, size, dtype=dtype) for size in (head, value_head))
    assert attention._flash_takes((query, query, value)) == takes


def test_this_pytorch_has_variable_length_attention_with_windows_and_grouped_keys():
    assert attention._varlen_options() == {"enable_gqa": True}
