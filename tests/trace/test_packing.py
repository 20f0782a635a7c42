"""Packed rows against each sequence alone, for every architecture's attention and logits."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import SamplingConfig
from trace_opd.trace.losses import Head
from trace_opd.trace.packing import PackedModel, pack, response_logits
from trace_opd.trace.policy import backbone, checkpoint_layers, load_policy
from trace_opd.trace.protocols import Prompt

A, B, C = [6, 20, 21, 22, 7], [6, 30, 7], [9]
ROWS = {
    "prompts of their own": [(A, 6), (B, 2), (C, 7)],
    "one prompt for all": [(A, 5), (A, 1), (A, 8)],
    "some share": [(A, 4), (A, 7), (B, 3), (C, 1), (C, 9), (A, 2)],
    "one sequence": [(B, 6)],
}


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": 9,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip


def tiny(model: Any, config: Any, **fields: Any) -> Any:
    """Two layers, four query heads on two key heads, random weights of a size that matters."""
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            bos_token_id=1, eos_token_id=2,
            **fields,
        )
    ).eval()  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.3)
    return made


def micro() -> Any:
    return load_policy(resolve_policy("micro"), "cpu", trainable=True).model


MODELS: dict[str, Callable[[], Any]] = {
    "micro": micro,
    "llama": lambda: tiny(LlamaForCausalLM, LlamaConfig),
    "a window shorter than sequences": lambda: tiny(
        MistralForCausalLM, MistralConfig, sliding_window=4
    ),
    "windows in some layers": lambda: tiny(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "a head with bias": lambda: tiny(PhiForCausalLM, PhiConfig),
    "windows in the mask alone": lambda: tiny(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
        mlp_only_layers=[0, 1],  # experts' kernels know no float64
    ),
    "longrope": lambda: tiny(
        Phi3ForCausalLM,
        Phi3Config,
        pad_token_id=0,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=9,
        max_position_embeddings=36,
    ),
    "dynamic rope": lambda: tiny(
        LlamaForCausalLM,
        LlamaConfig,
        max_position_embeddings=9,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}


def responses_of(rows: list[tuple[list[int], int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 60, length) for _, length in rows]


def alone(model: Any, prompts: list[list[int]], responses: list[np.ndarray]) -> torch.Tensor:
    """The states that predict responses, each sequence in its own pass: (tokens, hidden)."""
    states = []
    for prompt, response in zip(prompts, responses, strict=True):
        # A short pass, because dynamic rope's frequencies depend on the longest pass before.
        backbone(model)(input_ids=torch.tensor([prompt[:1]]))
        ids = torch.tensor([[*prompt, *response.tolist()]])
        states.append(backbone(model)(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1])
    return torch.cat(states)


def gradients_of(model: Any, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a function of the states that weighs each entry differently."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(states.shape, generator=generator).to(states.dtype)
    model.zero_grad(set_to_none=True)
    (states * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_packed_states_and_gradients_are_those_of_each_sequence_alone(name, rows, checkpointing):
    model = MODELS[name]().double()
    prompts, responses = [prompt for prompt, _ in rows], responses_of(rows)
    expected = alone(model, prompts, responses)
    gradients = gradients_of(model, expected)
    if checkpointing:
        checkpoint_layers(model)

    def keep(states: torch.Tensor, _: Head) -> torch.Tensor:
        return states

    got = PackedModel(model)(pack(prompts, responses), keep)
    # Norms of some architectures round to float32 in any dtype.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    packed = gradients_of(model, got)
    assert packed.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert (packed[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_logits_are_the_models_own(name):
    model = MODELS[name]()
    rows = ROWS["some share"]
    prompts, responses = [prompt for prompt, _ in rows], responses_of(rows)
    expected = []
    for p, r in zip(prompts, responses, strict=True):
        model(input_ids=torch.tensor([p[:1]]))  # see `alone`
        logits = model(input_ids=torch.tensor([[*p, *r.tolist()]])).logits
        expected.append(logits[0, len(p) - 1 : -1])
    got = response_logits(model, prompts, responses)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["longrope", "dynamic rope"])
@torch.no_grad()
def test_rotary_frequencies_are_those_of_each_length_whatever_stands_beside(name):
    model, short, long = MODELS[name](), np.array([30, 31]), np.arange(40, 50)
    one = response_logits(model, [A], [short])
    # The prompt is repeated for the other length, and the order of the kept tokens stays.
    keep = [np.arange(2), np.array([0, 9]), np.arange(2)]
    beside = response_logits(model, [A, A, A], [short, long, short], keep)
    torch.testing.assert_close(beside[:2], one)
    torch.testing.assert_close(beside[4:], one)
    torch.testing.assert_close(beside[2:4], response_logits(model, [A], [long])[[0, 9]])
    # The length matters: within a longer sequence the first token has other logits.
    assert (beside[2] - one[0]).abs().max() > 0.01
    # Modules stay as they were, so sampling does too.
    rotary = backbone(model).rotary_emb
    assert torch.equal(rotary.inv_freq, MODELS[name]().model.rotary_emb.inv_freq)
    assert "forward" not in vars(rotary)


def test_a_shared_prompt_is_read_once():
    row = pack([A, A, B], [np.array([1, 2]), np.array([3]), np.array([4])])
    assert row.input_ids.tolist() == [[*A, 1, 2, 3, *B, 4]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 0, 1, 2, 3]]
    # The prompt's last state predicts the first token of both responses.
    assert row.logit_positions.tolist() == [4, 5, 4, 10]


def test_gradients_are_the_same_bytes_each_time_on_several_threads():
    """The prompt's last state predicts every first token, so threads add to the same gradient."""
    model = tiny(LlamaForCausalLM, LlamaConfig)
    responses = 1200  # from 2^15 numbers on, PyTorch's gather uses several threads backward
    packed, row = PackedModel(model), pack([A] * responses, [np.array([20])] * responses)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [gradients_of(model, packed(row, lambda states, _: states)) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(again[name], gradient) for name, gradient in runs[0].items())


def test_a_response_does_not_see_what_shares_its_prompt():
    model = micro()
    long, short = np.arange(10, 20), np.array([30, 31, 32])
    with torch.no_grad():
        one = response_logits(model, [A, A], [long, short])[len(long) :]
        other = response_logits(model, [A, A], [long[::-1].copy(), short])[len(long) :]
    assert torch.equal(one, other)


def test_sampling_goes_on_as_before_once_a_model_reads_packed_rows():
    prompts = [Prompt([], ids) for ids in (A, B, C)]  # different lengths, so padded on the left
    sampling = SamplingConfig(temperature=0.9, max_new_tokens=24)
    seeds = [[1, 2], [3, 4], [5, 6]]
    fresh, packed = (load_policy(resolve_policy("micro"), "cpu", trainable=True) for _ in range(2))
    PackedModel(packed.model)(pack([A], [np.array([1, 2])]), lambda states, head: states)
    before, after = (
        TransformersPolicySampler(policy, 4096).sample(prompts, sampling, seeds)
        for policy in (fresh, packed)
    )
    for group, other in zip(before, after, strict=True):
        for one, two in zip(group, other, strict=True):
            assert one.token_ids == two.token_ids
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert len({tuple(c.token_ids) for group in after for c in group}) > 1


def test_a_window_matters_here():
    """The window cases above depend on this: without a window the states differ."""
    rows = ROWS["prompts of their own"]
    prompts, responses = [prompt for prompt, _ in rows], responses_of(rows)
    with torch.no_grad():
        states = [
            alone(tiny(MistralForCausalLM, MistralConfig, sliding_window=w), prompts, responses)
            for w in (4, 5, None)
        ]
    for one, other in pairwise(states):
        assert (one - other).abs().max() > 0.01
