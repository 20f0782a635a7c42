"""A step's counted operations are those of the products that PyTorch really runs."""

from dataclasses import replace

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import LoraConfig, OfflineConfig, TrainConfig
from trace_opd.trace.model_flops import ModelFlops, model_flops
from trace_opd.trace.policy import load_policy
from trace_opd.trace.sequences import TrainingSequence
from trace_opd.trace.trainer import Trainer


def sequence(group: str, index: int, prompt: int, response: int) -> TrainingSequence:
    ids = np.arange(1, response + 1, dtype=np.int64)
    return TrainingSequence(
        rollout_id=f"{group}-{index}",
        group_id=group,
        prompt_ids=[1 + len(group)] * prompt,
        token_ids=ids,
        logprobs=np.full(response, -1.0, np.float32),
        route=np.zeros(response, np.uint8),
        advantage=1.0 - 2 * index,
        reward=float(index),
        correct=bool(index),
        temperature=1.0,
        truncated=False,
        teacher_prompt_ids=None,
    )


def counted(sequences, lora: LoraConfig | None = None) -> tuple[dict[str, int], ModelFlops]:
    """Operations that PyTorch runs in a step's passes, by operator; and the model's counts."""
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True, lora=lora)
    # A schedule with a teacher, though it reads nothing here: with adapters it has a second set.
    trainer = Trainer(policy, TrainConfig(lora=lora, offline=OfflineConfig(steps=1)))
    flops = model_flops(policy.model)
    assert flops is not None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.accumulate_gradients(sequences, kl=0.0)
    ran = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    return ran, flops


def products(ran: dict[str, int]) -> int:
    return sum(count for op, count in ran.items() if op in ("aten.mm", "aten.addmm"))


def test_products_of_layers_and_head_are_counted_to_the_operation():
    step = [sequence("a", i, prompt=7, response=5 + i) for i in range(2)]
    step += [sequence("bb", i, prompt=4, response=9 + i) for i in range(2)]
    ran, flops = counted(step)
    assert products(ran) == replace(flops, pair=0.0).step(step)


def test_causal_attention_is_half_of_the_square_and_its_diagonal():
    # One response a prompt: those that share one compute the prompt's queries again.
    alone = [sequence("a", 0, prompt=6, response=10)]
    ran, flops = counted(alone)
    square = sum(count for op, count in ran.items() if op == "aten.bmm")
    ours = replace(flops, token=0.0, scored=0.0).step(alone)
    assert ours * 2 * 16 / (16 + 1) == square


def test_a_frozen_base_has_no_gradient_of_its_own():
    step = [sequence("a", i, prompt=7, response=5 + i) for i in range(2)]
    ran, flops = counted(step, LoraConfig(rank=4))
    tokens = 7 + 5 + 6
    # The first layer's input needs no gradient either: of queries, keys and values, base and A.
    spared = 2 * tokens * (128 * (128 + 64 + 64) + 3 * 4 * 128)
    assert replace(flops, pair=0.0).step(step) - products(ran) == spared


def test_a_window_bounds_the_keys_of_a_query():
    flops = ModelFlops(token=0.0, scored=0.0, pair=1.0, windows=(None, 4))
    # 1 + … + 6 in the first layer; 1 + 2 + 3 + 4 + 4 + 4 in the second.
    assert flops.step([sequence("a", 0, prompt=2, response=4)]) == 21 + 18


@pytest.mark.parametrize("setting", ["num_experts", "kv_lora_rank"])
def test_what_the_formula_does_not_cover_has_no_count(setting):
    model = load_policy(resolve_policy("micro"), "cpu").model
    assert model_flops(model) is not None
    setattr(model.config, setting, 8)
    assert model_flops(model) is None
