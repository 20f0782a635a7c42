"""Gradient checkpointing: recomputed activations, equal gradients, and sampling keeps its cache."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import LoraConfig, SamplingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.policy import backbone, checkpoint_layers, load_policy
from trace_opd.trace.protocols import Prompt

MICRO = resolve_policy("micro")
IDS = torch.arange(5, 69)[None]


def policy(checkpointing, lora=None):
    return load_policy(
        MICRO, "cpu", trainable=True, lora=lora, gradient_checkpointing=checkpointing
    )


def layers(model):
    return [m for m in backbone(model).modules() if isinstance(m, Qwen3DecoderLayer)]


def counted(model):
    """The index of each layer at each of its forward passes, recomputations included.

    Counted at the input of the MLP: a recomputation stops before the layer's end, as soon as it has
    everything that it needs.
    """
    calls = []
    for index, layer in enumerate(layers(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    return calls


def states(model):
    return backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state


def kept_bytes(model):
    """Bytes that autograd keeps of one forward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = states(model)
    del out
    return sum(kept.values())


def test_each_layer_is_run_again_in_the_backward_pass():
    for checkpointing, runs in ((False, 1), (True, 2)):
        model = policy(checkpointing).model
        calls = counted(model)
        loss = states(model).sum()
        assert len(calls) == len(layers(model))
        loss.backward()
        assert len(calls) == runs * len(layers(model))


def test_sampling_in_between_neither_recomputes_nor_disables_it():
    checkpointed = policy(True)
    calls = counted(checkpointed.model)
    sampling = SamplingConfig(max_new_tokens=8)
    args = ([Prompt([], [5, 6, 7])], sampling, [[1, 2]])
    with_cache = TransformersPolicySampler(checkpointed, 4096).sample(*args)
    plain = TransformersPolicySampler(policy(False), 4096).sample(*args)
    assert [c.token_ids for c in with_cache[0]] == [c.token_ids for c in plain[0]]
    del calls[:]
    states(checkpointed.model).sum().backward()
    assert len(calls) == 2 * len(layers(checkpointed.model))


def test_the_first_layers_alone_are_run_again():
    for count, runs in ((0, [1, 1, 1, 1]), (1, [2, 1, 1, 1]), (3, [2, 2, 2, 1])):
        model = policy(count).model
        calls = counted(model)
        states(model).sum().backward()
        assert [calls.count(index) for index in range(4)] == runs


def test_gradients_are_equal_and_memory_falls_with_each_layer_that_is_run_again():
    gradients, kept = [], []
    for count in (False, 0, 1, 2, 4, True):
        model = policy(count).model
        kept.append(kept_bytes(model))
        states(model).pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for found in gradients:
        assert all(torch.equal(*pair) for pair in zip(found, gradients[0], strict=True))
    none, zero, one, two, four, true = kept
    assert none == zero
    assert four == true
    assert none - one == one - two > 0  # all layers are alike
    assert (two - four) / 2 == pytest.approx(none - one, rel=0.02)  # the last keeps another input


def test_more_layers_than_the_policy_has_are_refused():
    with pytest.raises(InputError, match="is 5, and the policy has 4 layers; set at most 4, or tr"):
        policy(5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_gradients_are_equal_and_only_layer_inputs_are_kept(lora):
    if lora is not None:
        pytest.importorskip("peft")
    gradients = []
    for checkpointing in (False, True):
        model = policy(checkpointing, lora).model
        states(model).pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())
    one_state = IDS.numel() * backbone(policy(False).model).config.hidden_size * 4
    kept = kept_bytes(policy(True, lora).model)
    # One input per layer, and what the last norm keeps.
    assert kept < (len(layers(policy(True).model)) + 5) * one_state
    assert kept_bytes(policy(False, lora).model) > 4 * kept


def test_the_policy_stays_in_evaluation_mode():
    model = policy(True).model
    states(model)
    assert not model.training
    assert not any(layer.self_attn.training or layer.mlp.training for layer in layers(model))


def test_checkpointing_an_architecture_without_layers_of_the_kind_is_refused():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    for block in model.transformer.h:
        block.__class__ = type("Block", (torch.nn.Module,), {})
    with pytest.raises(InputError, match="gradient_checkpointing=false"):
        checkpoint_layers(model)
