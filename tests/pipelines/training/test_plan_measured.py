"""The plan's memory is within a tenth of what real steps take, in processes of their own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trace_opd.pipelines.training.plan import predict_memory
from trace_opd.pipelines.training.plan_setting import setting
from trace_opd.schemas.configs import TrainConfig
from trace_opd.tests.ranks.models import save_qwen3
from trace_opd.tests.ranks.torchrun import ended

BIG = {
    "vocab_size": 24_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = BIG | {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
PROGRAM = Path(__file__).with_name("measured_step.py")
# Large blocks return to the system when they are freed, so the resident set is the memory in use.
NO_HOARDING = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    # On the CPU oneDNN keeps packed copies of bfloat16 matrices.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "LRU_CACHE_CAPACITY": "1",
}  # fmt: skip
TOKENS, PROMPT = 48, 32
LORA = {"lora": {"rank": 16}}
NOT_GRADIENTS = ("start", "update")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of random models: 108 M parameters, and almost none."""
    made = {}
    for name, sizes in (("big", BIG), ("small", SMALL)):
        made[name] = folder = tmp_path_factory.mktemp(name)
        save_qwen3(folder, torch.bfloat16, **sizes)
    return {name: str(folder) for name, folder in made.items()}


@pytest.mark.ranks
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("ranks", "precision", "fields"),
    [
        pytest.param(1, "float32", {}, id="one-float32"),
        pytest.param(
            1,
            "bfloat16",
            {"gradient_checkpointing": True, "teacher": {"sync": "ema"}},
            id="one-bfloat16",
        ),
        pytest.param(2, "bfloat16", {}, id="two"),
        pytest.param(1, "bfloat16", LORA, id="one-lora"),
        pytest.param(2, "bfloat16", LORA, id="two-lora"),
    ],
)
def test_predicted_memory_is_within_a_tenth_of_what_real_steps_take(
    ranks, precision, fields, models
):
    policy = {"path": models["big"], "device": "cpu", "precision": precision}
    config = TrainConfig.model_validate(
        {"policy": policy, "offline": {"steps": 3}, "online": {"group_size": 4}}
        | {"groups_per_step": 2 * ranks, "micro_batch_tokens": 224}
        | fields
    )
    measured = measure(config, ranks, models["small"])
    where = setting(config, prompt_tokens=PROMPT, response_tokens=TOKENS)
    memory = predict_memory(replace(where, gpus=ranks))
    gradients = max(memory.total(phase) for phase in memory.phases if phase not in NOT_GRADIENTS)
    predicted = {"gradients": gradients, "update": memory.total("update")}
    if "start" in memory.phases:
        predicted["start"] = memory.total("start")
    for name, size in predicted.items():
        assert size == pytest.approx(max(one[name] for one in measured), rel=0.1), name


def measure(config: TrainConfig, ranks: int, small: str) -> list[dict[str, int]]:
    """What measured_step.py prints, by rank."""
    arguments = [PROGRAM, config.model_dump_json(), TOKENS, PROMPT, small]
    code, out, error = ended(ranks, *arguments, timeout=900, **NO_HOARDING)
    assert code == 0, error[-2000:]
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(found) == ranks
    return found
