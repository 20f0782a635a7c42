"""Engines next to trainers that share torch.distributed: one rank's, and one engine a rank.

Run by `make test-vllm`.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.schemas.configs import PromptConfig, VllmSampler
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trained import Trained

MODEL = os.environ.get("VLLM_TEST_MODEL", "smollm2")
CONFIG = VllmSampler(engine="vllm", kv_cache_gib=0.25, max_model_len=1024)
ENGINE = "sampler={engine: vllm, kv_cache_gib: 0.25, max_model_len: 1024}"

pytestmark = pytest.mark.slow


def test_five_steps_of_two_ranks_with_an_engine_in_each(lab: Any) -> None:
    """The weights are gathered on both ranks at each hand-over, and saved once the engines have
    closed.
    """
    lab.ended(lab.train(ENGINE, "seed=8", ranks=2))
    lab.check([0] * lab.steps)
    assert (lab.newest() / "checkpoints" / "final" / "model.safetensors").exists()


def test_five_steps_of_adapters_on_two_ranks(lab: Any) -> None:
    lab.ended(lab.train(ENGINE, "seed=9", "lora={rank: 4}", "optim.lr=1.0e-3", ranks=2))
    lab.check([0] * lab.steps)


def test_an_engine_leaves_the_trainers_process_group(tmp_path: Path, perturb: Any) -> None:
    """A trainer on one rank has a group too if its weights are sharded, and gathers them later."""
    student = load_policy(resolve_policy(MODEL), "cpu", "float32")
    probe = Probe(student.tokenizer, PromptConfig(), ["4821+3977", "12+99"])
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for turn in range(2):  # a second engine opens in the same group
            sampler = VllmPolicySampler(CONFIG, resolve_policy(MODEL), "float32", in_process=True)
            perturb(student, 1e-4, seed=turn)
            trained = Trained(student, PackedModel(student.model))
            probe.ask(trained)
            sampler.follow(trained, probe)
            sampler.close()
            ones = torch.ones(1)
            dist.all_reduce(ones)
            assert ones == 1
    finally:
        dist.destroy_process_group()
