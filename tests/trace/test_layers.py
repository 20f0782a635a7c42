"""Compiled and Liger's layers against transformers' own."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import OfflineConfig, ScheduleConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.layers import fuse_layers
from trace_opd.trace.packing import PackedModel, pack
from trace_opd.trace.policy import checkpoint_layers, load_policy
from trace_opd.trace.trainer import Trainer

from .test_batches import sequence_of, taught
from .test_packing import MODELS, ROWS, alone, gradients_of, responses_of

CPU = torch.device("cpu")
needs_liger = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="Liger is not installed"
)


@pytest.fixture
def compiler(monkeypatch) -> Any:
    """torch.compile without code generation, which takes most of its time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_layers_give_the_states_and_gradients_of_each_sequence_alone(compiler):
    model = MODELS["llama"]()
    for rows in (ROWS["some share"], ROWS["one sequence"]):
        prompts, responses = [prompt for prompt, _ in rows], responses_of(rows)
        plain = MODELS["llama"]()
        expected = alone(plain, prompts, responses)
        gradients = gradients_of(plain, expected)
        if not counters:
            checkpoint_layers(model)
            fuse_layers(model, "compile", CPU)
        got = PackedModel(model)(pack(prompts, responses), lambda states, _: states)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        packed = gradients_of(model, got)
        assert packed.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert (packed[parameter] - gradient).norm() <= 1e-4 * gradient.norm(), parameter
        # The first row's code serves rows of any length, and all layers.
        graphs = counters["stats"]["unique_graphs"]
        assert 0 < graphs <= 4


SEQUENCES = [taught(sequence_of(index, 3, 6 + index, f"g{index // 2}"), 4, 3) for index in range(4)]


def test_a_step_with_compiled_layers_is_the_same_sharded_by_fsdp(monkeypatch, compiler):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # faster still
    metrics, names = {}, {}
    for layers in ("eager", "compile"):
        policy = load_policy(resolve_policy("micro"), "cpu", "bfloat16", trainable=True)
        config = TrainConfig(
            offline=OfflineConfig(steps=2), schedule=ScheduleConfig(w0=0), layers=layers
        )
        trainer = Trainer(policy, config)
        names[layers] = set(policy.model.state_dict())
        metrics[layers] = trainer.train_step(SEQUENCES)
        assert (counters["stats"]["unique_graphs"] > 0) == (layers == "compile")
    assert names["compile"] == names["eager"]
    assert metrics["compile"] == pytest.approx(metrics["eager"], rel=1e-2)


def test_sampling_is_not_compiled(compiler):
    model = MODELS["llama"]()
    fuse_layers(model, "compile", CPU)
    with torch.no_grad():
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert not counters["stats"]


def test_ligers_kernels_need_a_cuda_device():
    with pytest.raises(InputError, match=r"need a CUDA device, .* set train\.layers=eager"):
        fuse_layers(MODELS["llama"](), "liger", CPU)


@needs_liger
def test_an_architecture_without_ligers_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match=r"^policy phi: Liger has no kernels"):
        fuse_layers(MODELS["a head with bias"](), "liger", CPU)


@needs_liger
def test_ligers_kernels_compute_what_transformers_does():
    script = Path(__file__).with_name("liger_layers.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
