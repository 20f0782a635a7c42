"""The trainer's weights in the form that engines load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.weights import bytes_of, policy_weights, write_weights
from trace_opd.schemas.configs import LoraConfig
from trace_opd.trace.policy import load_policy


def test_weights_have_the_names_of_the_models_own_tied_ones_included() -> None:
    policy = load_policy(resolve_policy("micro"), "cpu")
    weights = policy_weights(policy)
    assert weights.keys() == policy.model.state_dict().keys()
    assert weights["lm_head.weight"] is not None
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


@torch.no_grad()
def test_adapters_are_merged_under_the_plain_models_names() -> None:
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True, lora=LoraConfig(rank=2))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.01)
    weights = policy_weights(policy)
    plain = AutoModelForCausalLM.from_pretrained(resolve_policy("micro"), dtype=torch.float32)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    ids = torch.tensor([[1, 2, 3, 4]])
    merged, adapted = plain(ids).logits, policy.model(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_folder_loads_in_the_precision_that_the_policy_computes_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    policy = load_policy(resolve_policy("micro"), "cpu")
    policy.compute_dtype = dtype
    write_weights(policy, tmp_path / "made" / "weights")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["weights"]
    (file,) = (tmp_path / "made" / "weights").iterdir()
    written = load_file(file)
    for name, tensor in policy_weights(policy).items():
        assert torch.equal(written[name], tensor.to(dtype))
    assert 0 < file.stat().st_size - bytes_of(policy) < 10_000
