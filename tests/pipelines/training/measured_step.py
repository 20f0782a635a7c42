"""A training step's memory in this process, for test_plan_measured.py; alone or under torchrun.

python measured_step.py CONFIG RESPONSE_TOKENS PROMPT_TOKENS SMALL_MODEL

Prints the most bytes in use while the weights are placed, and in the optimiser step: while
gradients are computed, and in the update. What the libraries take is measured on a small model
and subtracted.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from trace_opd.schemas.configs import TrainConfig
from trace_opd.trace.policy import load_policy
from trace_opd.trace.ranks import join_ranks
from trace_opd.trace.sequences import TrainingSequence
from trace_opd.trace.trainer import Trainer

RESPONSES = 4  # of a group


def sequences(groups: int, tokens: int, prompt: int) -> list[TrainingSequence]:
    out = []
    for at in range(groups * RESPONSES):
        route = np.zeros(tokens, np.uint8)
        route[: tokens // 4] = 1
        ids = [at // RESPONSES + 1] * prompt
        out.append(
            TrainingSequence(
                rollout_id=f"r{at}", group_id=f"g{at // RESPONSES}", prompt_ids=ids,
                token_ids=np.arange(tokens) % 60, logprobs=np.full(tokens, -9.0, np.float32),
                route=route, advantage=1.0 if at % 2 else -1.0, reward=float(at % 2),
                correct=bool(at % 2), temperature=1.0, truncated=False, teacher_prompt_ids=ids,
            )
        )  # fmt: skip
    return out


def resident(name: str) -> int:
    """VmRSS: bytes in use. VmHWM: the most since the last `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


def forget() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    torch.set_num_threads(1)
    config = TrainConfig.model_validate_json(sys.argv[1])
    tokens, prompt, small = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ranks = join_ranks("cpu")

    def trainer(path: str) -> Trainer:
        policy = load_policy(
            path, "cpu", config.policy.precision, trainable=True, lora=config.lora,
            gradient_checkpointing=config.gradient_checkpointing, ranks=ranks,
        )  # fmt: skip
        return Trainer(policy, config, ranks)

    measured = {}

    def update() -> tuple[float, float]:
        measured["gradients"] = resident("VmHWM") - before
        forget()
        return step_optimizer()

    groups = config.groups_per_step
    few, many = sequences(groups, 4, 4), sequences(groups, tokens, prompt)
    first = trainer(small)
    for rows in (few, many):
        first.train_step(rows)
    del first
    forget()
    before = resident("VmRSS")
    forget()
    trained = trainer(config.policy.path)
    measured["start"] = resident("VmHWM") - before
    trained.train_step(few)  # makes the optimiser's states
    step_optimizer, trained._step_optimizer = trained._step_optimizer, update
    forget()
    trained.train_step(many)
    measured["update"] = resident("VmHWM") - before
    print(json.dumps(measured), flush=True)


main()
