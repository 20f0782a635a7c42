"""A model folder is written file by file as transformers writes it, also where it fuses weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from trace_opd.pipelines.models import MICRO
from trace_opd.trace.loading import load_tokenizer
from trace_opd.trace.lora import plain_weights
from trace_opd.trace.model_folder import write_settings, write_weights

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "initializer_range": 0.2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}


def model_of(kind: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings)).eval()


def held(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


# Loading fuses the experts of mixtral and qwen3_moe, so their files have other names and shapes.
@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000], ids=["one file", "many"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("mixtral", MOE),
        ("qwen3_moe", MOE),
    ],
    ids=["untied", "tied", "mixtral", "qwen3_moe"],
)
def test_the_files_hold_what_transformers_own_hold(kind, settings, file_bytes, tmp_path):
    # Loaded from a folder, as policies are.
    model_of(kind, **settings).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "ours"
    write_settings(model, load_tokenizer(str(MICRO)), folder)
    write_weights(model, plain_weights(model), folder, file_bytes=file_bytes)
    ours, theirs = held(folder), held(tmp_path / "base")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if file_bytes == 1 << 30:
        assert files == ["model.safetensors"]
    else:
        count = len(files)
        assert count > 2
        assert files == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = model.state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_another_type_is_in_the_weights_and_in_the_config(tmp_path):
    model = model_of("qwen3")
    write_settings(model, load_tokenizer(str(MICRO)), tmp_path)
    write_weights(model, plain_weights(model), tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in held(tmp_path).values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
