"""Calls to vLLM's engine process: its result, its error, and its death. What an engine finds in the
process that it starts in, and what it must leave there.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from trace_opd.pipelines.samplers.vllm_process import (
    ask_process,
    engine_environment,
)
from trace_opd.schemas.errors import EngineEnded


@pytest.fixture
def engine():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    yield process
    process.kill()
    process.join()


def fail() -> None:
    raise ValueError("a bad request")


def test_a_call_gives_the_engines_result_or_error(engine):
    assert ask_process([engine], lambda: 1 + 1) == 2
    with pytest.raises(ValueError, match="a bad request"):
        ask_process([engine], fail)


def test_a_call_that_blocks_ends_when_the_engines_process_dies(engine):
    threading.Timer(0.5, engine.kill).start()
    with pytest.raises(EngineEnded, match="process has ended"):
        ask_process([engine], threading.Event().wait)


def test_an_error_of_a_dead_engine_is_its_end(engine):
    engine.kill()
    engine.join()
    with pytest.raises(EngineEnded, match="process has ended"):
        ask_process([engine], fail)


@pytest.mark.parametrize("in_process", [True, False])
def test_an_engine_is_a_rank_of_torchrun_in_the_trainers_process_alone(monkeypatch, in_process):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with engine_environment(in_process, one_gpu=True):
        assert os.environ.get("RANK") == ("1" if in_process else None)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("4,6" if in_process else "6")
    assert os.environ["RANK"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_an_engine_over_several_gpus_sees_them_all(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with engine_environment(in_process=False, one_gpu=False):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


GROUPS = """
import sys
import torch.distributed as dist
from trace_opd.pipelines.samplers.vllm_process import default_group_kept

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
engines = dist.new_group([0])
with default_group_kept():
    dist.destroy_process_group(engines)
    dist.destroy_process_group()
assert dist.is_initialized()
try:
    dist.get_backend(engines)
except ValueError as error:
    assert "is not initialized" in str(error)
else:
    raise AssertionError("the engine's own group is still there")
dist.destroy_process_group()
assert not dist.is_initialized()
"""


def test_the_trainers_process_group_outlives_an_engines(tmp_path):
    # In a process of its own: this one may have a default group already.
    subprocess.run([sys.executable, "-c", GROUPS, str(tmp_path / "store")], check=True)
