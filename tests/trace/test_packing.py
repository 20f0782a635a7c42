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
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import SamplingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.losses import Head
from trace_opd.trace.packing import PackedModel, check_architecture, pack, response_logits
from trace_opd.trace.policy import backbone, checkpoint_layers, load_policy
from trace_opd.trace.protocols import Prompt

A, B, C = [6, 20, 21, 22, 7], [6, 30, 7], [9]
ROWS = {
    "prompts of their own": [(A, 6), (B, 2), (C, 7)],
    "one prompt for all": [(A, 5), (A, 1), (A, 8)],
    "some share": [(A, 4), (A, 7), (B, 3), (C, 1), (C, 9), (A, 2)],
    "one sequence": [(B, 6)],
}


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
}


def responses_of(rows: list[tuple[list[int], int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 60, length) for _, length in rows]


def alone(model: Any, prompts: list[list[int]], responses: list[np.ndarray]) -> torch.Tensor:
    """The states that predict responses, each sequence in its own pass: (tokens, hidden)."""
    states = []
    for prompt, response in zip(prompts, responses, strict=True):
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
    expected = [
        model(input_ids=torch.tensor([[*p, *r.tolist()]])).logits[0, len(p) - 1 : -1]
        for p, r in zip(prompts, responses, strict=True)
    ]
    got = response_logits(model, prompts, responses)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_known_architectures_pass_the_check(name):
    check_architecture(MODELS[name]())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("granite", lambda: tiny(GraniteForCausalLM, GraniteConfig, logits_scaling=8.0)),
        (
            "gpt_oss",  # attends to sinks in addition to its tokens
            lambda: tiny(
                GptOssForCausalLM, GptOssConfig, num_local_experts=2, num_experts_per_tok=1
            ),
        ),
    ],
)
def test_an_architecture_with_logits_or_attention_of_its_own_is_refused(name, make):
    with pytest.raises(InputError, match=name):
        check_architecture(make())


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
