"""The policy in training, as samplers with weights of their own get it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import LoraConfig
from trace_opd.trace.lora import save_adapters
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.trained import Trained

ROWS = [[1, 2, 3, 4], [5, 6, 7]]


def plain_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(resolve_policy("micro"), dtype=torch.float32)


def trained(policy: Policy) -> Trained:
    return Trained(policy, PackedModel(policy.model))


@pytest.fixture(scope="module")
def adapted() -> Policy:
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True, lora=LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    return policy


@torch.no_grad()
def logprobs(model: torch.nn.Module, row: list[int]) -> np.ndarray:
    """Those of the row's tokens but the first, by transformers' own logits."""
    scores = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(row[1:])[:, None])[:, 0].double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_models_own_in_the_compute_type_tied_ones_included(dtype: torch.dtype):
    policy = load_policy(resolve_policy("micro"), "cpu")
    policy.compute_dtype = dtype
    weights = dict(trained(policy).weights())
    state = policy.model.state_dict()
    assert list(weights) == list(state)
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[name].to(dtype))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert trained(policy).adapters() is None


def test_adapters_are_merged_under_the_plain_models_names(adapted: Policy):
    weights = dict(trained(adapted).weights())
    plain = plain_model()
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        merged, own = plain(ids).logits, adapted.model(ids).logits
    torch.testing.assert_close(merged, own, rtol=1e-4, atol=1e-4)


def test_adapters_alone_are_those_of_pefts_file(adapted: Policy, tmp_path):
    save_adapters(adapted.model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    alone = trained(adapted).adapters()
    assert alone is not None
    assert alone.keys() == written.keys()
    for name, tensor in alone.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, written[name])


def test_log_probabilities_are_transformers_own():
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True)
    for row, scores in zip(ROWS, trained(policy).logprobs(ROWS), strict=True):
        np.testing.assert_allclose(scores, logprobs(plain_model(), row), atol=1e-5)


@torch.no_grad()
def test_scores_follow_the_losss_fp32_logits():
    policy = load_policy(resolve_policy("micro"), "cpu", "bfloat16")
    states = policy.model.model(torch.tensor([ROWS[0]])).last_hidden_state[0, :-1].float()
    logits = states @ policy.model.lm_head.weight.float().T
    exact = logits.log_softmax(-1).gather(1, torch.tensor(ROWS[0][1:])[:, None])[:, 0].numpy()
    packed = PackedModel(policy.model)
    (ours,) = Trained(policy, packed, fp32_logits=True).logprobs(ROWS[:1])
    (rounded,) = Trained(policy, packed).logprobs(ROWS[:1])
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert np.abs(rounded - exact).max() > 1e-4
