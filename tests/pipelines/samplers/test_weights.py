"""The trainer's weights and adapters in the form that engines load."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.weights import (
    engine_rank,
    weights_bytes,
    write_adapters,
    write_weights,
)
from trace_opd.schemas.configs import LoraConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.lora import AdapterForm, adapter_form
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.trained import Trained


def trained(policy: Policy) -> Trained:
    return Trained(policy, PackedModel(policy.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_folder_loads_in_the_precision_that_the_policy_computes_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    policy = load_policy(resolve_policy("micro"), "cpu")
    policy.compute_dtype = dtype
    write_weights(trained(policy), tmp_path / "made" / "weights", file_bytes=2**20)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["weights"]
    files = list((tmp_path / "made" / "weights").iterdir())
    assert len(files) > 1
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = dict(trained(policy).weights())
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor)


def test_the_bytes_of_weights_are_known_from_the_models_files() -> None:
    policy = load_policy(resolve_policy("micro"), "cpu")
    own = sum(p.numel() for p in policy.model.parameters())  # tied ones once, as in the files
    for dtype in (torch.float32, torch.bfloat16):
        estimate = weights_bytes(resolve_policy("micro"), dtype)
        assert own * dtype.itemsize <= estimate <= 2.1 * own * dtype.itemsize


@torch.no_grad()
def test_written_adapters_are_pefts_own(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=6, target_modules=["q_proj", "down_proj"])
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True, lora=lora)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.05)
    form = adapter_form(policy.model)
    assert form == AdapterForm(2, 6.0, ("down_proj", "q_proj"))
    write_adapters(trained(policy), form, tmp_path / "adapters")
    plain = AutoModelForCausalLM.from_pretrained(resolve_policy("micro"), dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    base = plain(ids).logits
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapters"))(ids).logits
    torch.testing.assert_close(loaded, policy.model(ids).logits)
    assert (loaded - base).abs().max() > 0.01
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["r"] == 2


def test_a_model_without_adapters_has_no_form_of_them() -> None:
    assert adapter_form(load_policy(resolve_policy("micro"), "cpu").model) is None


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (32, 32), (33, 64), (512, 512)])
def test_engines_take_adapters_up_to_a_rank(rank: int, limit: int) -> None:
    assert engine_rank(AdapterForm(rank, 1.0, ())) == limit


def test_a_rank_above_the_engines_limit_is_refused() -> None:
    with pytest.raises(InputError, match=r"lora\.rank: is 513, .* sampler\.adapters=merge"):
        engine_rank(AdapterForm(513, 1.0, ()))
