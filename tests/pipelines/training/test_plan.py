"""The plan of a run: exact counts, and memory within a tenth of real steps."""

import json
import os

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from trace_opd.pipelines.training.model_shape import model_shape
from trace_opd.pipelines.training.plan import (
    activation_bytes,
    memory_line,
    plan_table,
    predict_memory,
    predict_seconds,
    setting,
)
from trace_opd.pipelines.training.throughput import measured_rates
from trace_opd.schemas.configs import LoraConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.lora import add_adapters
from trace_opd.trace.packing import PackedModel, pack

QWEN = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SMALL = QWEN | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}


def folder_of(tmp_path, kind=Qwen3Config, **sizes):
    kind(**(SMALL | sizes)).save_pretrained(tmp_path)
    return str(tmp_path)


def train_config(path, **fields):
    return TrainConfig.model_validate(
        {"policy": {"path": path, "device": "cpu"}, "offline": {"steps": 3}} | fields
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_parameters_are_counted_exactly(kind, tied, tmp_path):
    path = folder_of(tmp_path, kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(kind.from_pretrained(path))
    shape = model_shape(path)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trainable == shape.parameters
    assert shape.tied is tied
    embeddings = (1 if tied else 2) * 300 * 64
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shape.linear == shape.parameters - embeddings - norms


def test_trained_adapters_are_counted_exactly(tmp_path):
    pytest.importorskip("peft")
    path, lora = folder_of(tmp_path), LoraConfig(rank=5, target_modules=["q_proj", "down_proj"])
    model = add_adapters(AutoModelForCausalLM.from_config(Qwen3Config.from_pretrained(path)), lora)
    shape = model_shape(path, lora)
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.trainable == 2 * 5 * (64 + 96 + 200 + 64)
    assert shape.parameters == model_shape(path).parameters


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_activation_bytes_are_what_autograd_keeps_of_a_layer(kind, precision, lora, tmp_path):
    """Exact for the float32 and frozen parts; counted as the difference of 3 and 2 layers."""
    if lora is not None:
        pytest.importorskip("peft")
    kept, tokens = {}, 256
    for layers in (2, 3):
        path = folder_of(tmp_path / str(layers), kind, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(kind.from_pretrained(path)).eval()
        if lora is not None:
            model = add_adapters(model.to(getattr(torch, precision)), lora)
        row = pack([[1] * 8], [np.arange(tokens - 8)])
        kept[layers] = kept_bytes(PackedModel(model), row, tokens)
    policy = {"path": path, "device": "cpu", "precision": precision}
    config = TrainConfig.model_validate(
        {"policy": policy, "offline": {"steps": 1}, "lora": lora and lora.model_dump()}
    )
    assert (kept[3] - kept[2]) / tokens == activation_bytes(setting(config))


def kept_bytes(model, row, tokens):
    """Bytes that autograd keeps per token, without parameters and their low-precision copies."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and {tokens, tokens - 8} & set(tensor.shape):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        model(row, lambda states, head: states)
    return sum(size for size, _ in kept.values())


def test_checkpointing_lora_and_the_end_of_the_kl_take_memory_away(tmp_path):
    path = folder_of(tmp_path, **QWEN)

    def peak(**fields):
        return predict_memory(setting(train_config(path, **fields))).peak

    assert peak(gradient_checkpointing=True) < peak()
    weights = 4 * model_shape(path).parameters
    assert peak() - peak(schedule={"w0": 0.0}) == weights
    assert peak(loss={"reference_kl": 0.1}) - peak() == weights


def test_what_is_sharded_is_divided_by_the_gpus_and_what_is_not_stays(tmp_path):
    config = train_config(folder_of(tmp_path, **QWEN), micro_batch_tokens=512)
    one, four = (predict_memory(setting(config, gpus)) for gpus in (1, 4))
    assert {name: size // 4 for name, size in one.held.items()} == four.held
    assert four.training["gradients"] == one.training["gradients"] // 4
    assert four.training["activations"] == one.training["activations"]
    assert "gathered weights" in four.training
    assert "gathered weights" not in one.training


def test_seconds_follow_from_operations(tmp_path):
    """A step of 2 groups: 2 · (10 + 4 · 90) tokens, worked out by hand."""
    config = train_config(
        folder_of(tmp_path), groups_per_step=2, online={"group_size": 4}, schedule={"w0": 0.0}
    )
    where = setting(config, prompt_tokens=10, response_tokens=90)
    shape = where.shape
    forward = 2 * shape.linear + 2 * 2 * 96 * 100
    expected = 740 * (3 * forward + 6 * 300 * 64) / 1e9
    assert predict_seconds(where, 1e9, 1e9) == {"training": pytest.approx(expected)}
    checkpointed = config.model_copy(update={"gradient_checkpointing": True})
    more = predict_seconds(setting(checkpointed, None, 10, 90), 1e9, 1e9)["training"]
    assert more - expected == pytest.approx(740 * forward / 1e9)


def test_online_steps_have_a_cache_and_decoding_reads_the_weights_once_per_token(tmp_path):
    config = train_config(
        folder_of(tmp_path), offline={"steps": 0}, groups_per_step=2,
        online={"steps": 1, "group_size": 4, "sampling": {"max_new_tokens": 90}},
    )  # fmt: skip
    where = setting(config, prompt_tokens=10)
    # Keys and values of 48 numbers in float32, two layers and a copy of one, 8 rows of 100.
    assert predict_memory(where).sampling["key-value cache"] == 3 * 8 * 48 * 8 * 100
    weights = 4 * (where.shape.linear + where.shape.head)
    seconds = predict_seconds(where, 1e15, 1e9)["sampling"]
    assert seconds == pytest.approx(90 * weights / 1e9)


def test_the_table_and_the_line_name_the_peak(tmp_path):
    config = train_config(folder_of(tmp_path))
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(plan_table(config))
    text = console.export_text()
    peak = f"{predict_memory(setting(config)).peak / 2**20:.1f} MiB"
    assert "AdamW states" in text
    assert peak in text
    assert "seconds per step" in text
    assert memory_line(config).startswith(f"memory: {peak} at its peak (weights ")


def test_throughput_is_measured_where_it_is_not_given():
    flops, bandwidth = measured_rates("cpu", False, seconds=0.05)
    assert 1e8 < flops < 1e14
    assert 1e8 < bandwidth < 1e13


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json cannot be loaded"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="no intermediate_size"):
        model_shape(str(tmp_path))
    # Training without a plan still works.
    assert memory_line(train_config(str(tmp_path))).startswith("memory: not planned (policy ")
