"""What each rank holds at the start of a training: its shards, never a whole copy of its own."""

import json
from pathlib import Path

import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.tests.ranks.models import save_qwen3
from trace_opd.tests.ranks.torchrun import ended

RANKS = """
import json, resource, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from trace_opd.schemas.configs import LoraConfig, TrainConfig
from trace_opd.trace.policy import load_policy
from trace_opd.trace.ranks import join_ranks
from trace_opd.trace.trainer import Trainer

path, small, out, config = sys.argv[1:]
config = TrainConfig.model_validate_json(config)
torch.set_num_threads(1)
ranks = join_ranks("cpu")

def used(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

def held(module):
    return sum(p.to_local().untyped_storage().nbytes() for p in module.parameters())

def start(path):
    policy = load_policy(path, "cpu", config.policy.precision, trainable=True, ranks=ranks)
    return Trainer(policy, config, ranks)

start(small)  # imports, process groups and buffers, which do not grow with the model
before = used("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
trainer = start(path)
Path(out, f"{ranks.index}.json").write_text(json.dumps({
    "student": held(trainer.student), "teacher": held(trainer.teacher),
    "now": used("VmRSS") - before, "peak": used("VmHWM") - before,
}))
"""


MICRO = resolve_policy("micro")
SLACK = 60e6  # bytes: the allocator's, and the pages of Python's own objects


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int, int]:
    """A random Qwen3 of 200 M parameters in bfloat16; its parameters, and those of its largest
    matrix.
    """
    folder = tmp_path_factory.mktemp("large")
    model = save_qwen3(
        folder, torch.bfloat16, vocab_size=32_000, hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=11, num_attention_heads=16, num_key_value_heads=8, head_dim=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder, model.num_parameters(), model.lm_head.weight.numel()


@pytest.mark.ranks
@pytest.mark.parametrize(("count", "precision"), [(2, "bfloat16"), (4, "float32")])
def test_ranks_start_with_shards_alone(large, count, precision, tmp_path):
    folder, parameters, largest = large
    config = {"offline": {"steps": 1}, "policy": {"precision": precision}}
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    code, _, error = ended(count, script, folder, MICRO, tmp_path, json.dumps(config))
    assert code == 0, error
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    frozen = 4 if precision == "float32" else 2
    for rank, found in enumerate(ranks):
        # Even shards, but for matrices whose rows do not divide.
        assert found["student"] == pytest.approx(4 * parameters / count, rel=0.01)
        assert found["teacher"] == pytest.approx(frozen * parameters / count, rel=0.01)
        shards = found["student"] + found["teacher"]
        # The first rank holds the model as its files do, until all have their shards.
        files = 0 if rank else 2 * parameters
        assert shards - SLACK < found["now"] < shards + files + 3 * SLACK
        # The largest matrix whole: received in its stored type, and in float32.
        assert found["peak"] < shards + files + (2 + 4 + 4) * largest + SLACK
