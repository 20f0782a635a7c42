"""The plan of a run: exact counts. test_plan_measured.py compares its memory with real steps."""

import json
import os

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from trace_opd.pipelines.training.model_shape import model_shape
from trace_opd.pipelines.training.plan import activation_bytes, predict_memory
from trace_opd.pipelines.training.plan_setting import setting
from trace_opd.pipelines.training.plan_table import memory_line, plan_table
from trace_opd.pipelines.training.step_seconds import predict_seconds
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
    """Counted as the difference of 3 and 2 layers."""
    if lora is not None:
        pytest.importorskip("peft")
    kept, tokens = {}, 256
    for layers in (2, 3):
        path = folder_of(tmp_path / str(layers), kind, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(kind.from_pretrained(path)).eval()
        if lora is not None:
            model = add_adapters(model, lora)
        model = model.to(getattr(torch, precision))  # as FSDP gathers it
        row = pack([[1] * 8], [np.arange(tokens - 8)])
        kept[layers] = kept_bytes(PackedModel(model), row, tokens)
    policy = {"path": path, "device": "cpu", "precision": precision}
    config = TrainConfig.model_validate(
        {"policy": policy, "offline": {"steps": 1}, "lora": lora and lora.model_dump()}
    )
    assert (kept[3] - kept[2]) / tokens == activation_bytes(setting(config))


def kept_bytes(model, row, tokens):
    """Bytes that autograd keeps per token, without parameters."""
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
    assert four.phases["loss"]["gradients"] == one.phases["loss"]["gradients"] // 4
    assert four.phases["loss"]["activations"] == one.phases["loss"]["activations"]
    assert "gathered embeddings and head" in four.phases["loss"]
    assert not any("gathered" in name for parts in one.phases.values() for name in parts)
    assert "reduction" in four.phases
    assert "reduction" not in one.phases  # float32 on one rank is not sharded


def low(path, **fields):
    """Memory of a run in bfloat16."""
    policy = {"path": path, "device": "cpu", "precision": "bfloat16"}
    return predict_memory(setting(train_config(path, policy=policy, **fields)))


def test_frozen_copies_are_in_the_compute_type_and_an_average_in_float32(tmp_path):
    path = folder_of(tmp_path)
    weights = model_shape(path).parameters
    both = low(path, loss={"reference_kl": 0.1})
    assert both.held == {
        "weights": 4 * weights, "optimiser states": 8 * weights,
        "teacher": 2 * weights, "reference": 2 * weights,
    }  # fmt: skip
    assert low(path, teacher={"sync": "ema"}).held["teacher"] == 4 * weights
    # Gathered in every pass and freed after it: student's, teacher's and reference's.
    ends = (2 * 300 + 1) * 64
    assert model_shape(path).ends == ends
    assert both.phases["loss"]["gathered embeddings and head"] == 3 * 2 * ends
    # bfloat16 gradients, float32 before and after they are sharded over the one rank.
    reduced = both.phases["reduction"]["gradients of embeddings and head"]
    assert reduced == (2 + 4 + 4) * ends


@pytest.mark.parametrize(
    ("sync", "teacher"), [("frozen", 0), ("periodic", 4 * 424), ("ema", 4 * 424)]
)
def test_with_adapters_there_is_no_copy_of_the_base(sync, teacher, tmp_path):
    pytest.importorskip("peft")
    path = folder_of(tmp_path)
    lora = {"rank": 1, "target_modules": ["q_proj", "down_proj"]}  # 2 · (64 + 96 + 200 + 64)
    memory = low(path, lora=lora, teacher={"sync": sync}, loss={"reference_kl": 0.1})
    weights, adapters = model_shape(path).parameters, 2 * 424
    expected = {
        "weights": 2 * weights + 4 * adapters, "optimiser states": 8 * adapters,
        "teacher": 2 * teacher,
    }  # fmt: skip
    assert memory.held == {name: size for name, size in expected.items() if size}
    assert "reduction" not in memory.phases  # embeddings and head are not trained


@pytest.mark.parametrize("lora", [None, {"rank": 1}])
def test_another_teacher_is_counted_by_its_own_shape(lora, tmp_path):
    if lora:
        pytest.importorskip("peft")
    path = folder_of(tmp_path / "student")
    other = folder_of(tmp_path / "teacher", hidden_size=128, num_hidden_layers=3)
    shape, theirs = model_shape(path), model_shape(other)
    teacher = {"sync": "frozen", "model": {"path": other}}
    memory = low(path, lora=lora, teacher=teacher)
    assert memory.held["teacher"] == 2 * theirs.parameters
    ends = (2 * 300 + 1) * 128
    loss, own = memory.phases["loss"], memory.phases["teacher"]
    assert loss["gathered embeddings and head"] == 2 * (shape.ends + ends)
    assert own["gathered embeddings and head"] == 2 * ends  # the student's are freed
    assert own["gathered layers"] == 2 * theirs.layer
    # Both are read on this machine's CPU, the student is placed first.
    start = memory.phases["start"]["whole embeddings and head"]
    read = 2 * theirs.parameters
    student = (2 if lora else 4) * shape.ends + shape.stored_bytes * shape.parameters
    assert start == max(student, read + 2 * ends)
    assert (
        low(path, schedule={"w0": 0.0}, teacher=teacher).held
        == low(path, schedule={"w0": 0.0}).held
    )
    held = low(path, teacher=teacher).host["a checkpoint while it is written"]
    assert held == 12 * shape.parameters


def test_adapters_teach_with_the_shape_of_their_base(tmp_path):
    path = folder_of(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": path}))
    teacher = {"sync": "frozen", "model": {"path": str(adapter)}}
    assert setting(train_config(path, teacher=teacher)).teacher == model_shape(path)


def test_eight_bits_and_offloading_take_optimiser_states_away(tmp_path):
    path = folder_of(tmp_path)
    weights = model_shape(path).parameters
    eight = low(path, optim={"kind": "adamw_8bit"})
    assert eight.held["optimiser states"] == int((2 + 2 * 4 / 64) * weights)
    offloaded = low(path, optim={"offload": True})
    assert offloaded.held == {"teacher": 2 * weights}
    assert "gradients" not in offloaded.phases["update"]
    assert offloaded.host["weights and optimiser"] == 16 * weights


def test_recomputing_more_layers_never_takes_more_memory(tmp_path):
    path = folder_of(tmp_path, **QWEN)
    peaks = [low(path, gradient_checkpointing=count).peak for count in range(9)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == low(path).peak
    assert peaks[8] == low(path, gradient_checkpointing=True).peak < peaks[0]


def test_a_response_at_its_limit_is_a_row_however_small_the_micro_batch(tmp_path):
    online = {"steps": 1, "sampling": {"max_new_tokens": 900}}
    config = train_config(folder_of(tmp_path), online=online, micro_batch_tokens=100)
    assert setting(config, prompt_tokens=50, response_tokens=10).row_tokens == 950


def test_an_engine_is_counted_where_it_is_awake(tmp_path):
    path = folder_of(tmp_path)
    shape = model_shape(path)
    online = {"steps": 1, "sampling": {"max_new_tokens": 90}}
    policy = {"path": path, "device": "cuda", "precision": "bfloat16"}
    made = {}
    for staleness in (0, 1):
        config = train_config(
            path, policy=policy, sampler={"engine": "vllm"},
            online=online | {"max_staleness": staleness},
        )  # fmt: skip
        made[staleness] = predict_memory(setting(config, gpus=1, prompt_tokens=10))
    # Keys and values of 48 numbers, two layers, 100 tokens.
    engine = {
        "engine's weights": 2 * shape.parameters,
        "engine's cache, at least": 2 * 2 * 48 * 2 * 100,
    }
    handed_over = {"a tensor handed over": 6 * 300 * 64}
    assert made[0].phases["sampling"] == engine | handed_over
    assert not engine.keys() & made[0].held.keys()
    # One step ahead it samples while the trainer works.
    assert made[1].phases["sampling"] == handed_over
    assert engine.items() <= made[1].held.items()
    assert made[1].total("start") == made[0].total("start")
    for memory in made.values():
        assert memory.phases["probe"]["gathered weights"] == 2 * (shape.ends + shape.layer)


def test_servers_take_no_memory_here(tmp_path):
    sampler = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1"}
    memory = predict_memory(
        setting(train_config(folder_of(tmp_path), sampler=sampler, online={"steps": 1}))
    )
    assert "sampling" not in memory.phases
    assert "probe" in memory.phases


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


def test_a_contrast_costs_a_teachers_pass_for_each_of_its_texts(tmp_path):
    routing = {"key": "reweight", "error": "reweight", "teacher_context": "peer"}
    several = {"contrast_context": "wrong_peer", "contrasts": 3}

    def seconds(**fields):
        config = train_config(folder_of(tmp_path), online={"routing": routing | fields})
        return predict_seconds(setting(config), 1e9, 1e9)

    one = seconds()["teacher, while λ > 0"]
    assert "contrast, while λ > 0" not in seconds()
    assert seconds(**several)["contrast, while λ > 0"] == pytest.approx(3 * one)


def test_online_steps_have_a_cache_and_decoding_reads_the_weights_once_per_token(tmp_path):
    config = train_config(
        folder_of(tmp_path), offline={"steps": 0}, groups_per_step=2,
        online={"steps": 1, "group_size": 4, "sampling": {"max_new_tokens": 90}},
    )  # fmt: skip
    where = setting(config, prompt_tokens=10)
    # Keys and values of 48 numbers in float32, two layers and a copy of one, 8 rows of 100.
    assert predict_memory(where).phases["sampling"]["key-value cache"] == 3 * 8 * 48 * 8 * 100
    weights = 4 * (where.shape.linear + where.shape.head)
    seconds = predict_seconds(where, 1e15, 1e9)["sampling"]
    assert seconds == pytest.approx(90 * weights / 1e9)


def test_the_table_and_the_line_name_the_peak(tmp_path):
    config = train_config(folder_of(tmp_path))
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(plan_table(config))
    text = console.export_text()
    peak = f"{predict_memory(setting(config)).peak / 2**20:.1f} MiB"
    assert "optimiser states" in text
    assert peak in text
    assert "seconds per step" in text
    line = memory_line(config)
    assert line.startswith(f"memory: {peak} at its peak, ")
    assert "weights " in line


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
