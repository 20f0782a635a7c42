"""The optimiser and its learning rate: PyTorch's AdamW, or torchao's with moments of 8 bits.

trainer.py builds the optimiser from the student's trained parameters, which are float32 and may be
sharded, and sets its learning rate before each step.
"""

import math
from collections.abc import Iterable

import torch

from ..schemas.configs import OptimConfig
from ..schemas.errors import InputError
from ..schemas.extras import require
from .adamw_8bit import BLOCK, AdamW8bit

# Bytes of both moments per trained parameter; with 8 bits a small tensor keeps float32.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / BLOCK)}


def check_optimizer(config: OptimConfig, device: torch.device, sharded: bool) -> None:
    """Refuse what `make_optimizer` could not build; costs nothing. sharded: see `Ranks.shards`.

    Raises:
        InputError: a package is missing, or there is nothing to offload from.
    """
    if config.kind == "adamw_8bit":
        require("torchao")
    if config.offload and device.type == "cpu":
        raise InputError("optim.offload: the device is the CPU already; set optim.offload=false")
    if config.offload and not sharded:
        raise InputError(
            "optim.offload: one rank in float32 is not sharded, and FSDP2 offloads shards; set "
            "policy.precision=bfloat16"
        )


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """An optimiser of those parameters that have gradients.

    device: on which the passes run; with `offload` the parameters are on the CPU.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw_8bit":
        return AdamW8bit(trained, config.lr, betas, config.weight_decay)
    # PyTorch's default on the CPU updates one tensor after another. The fused update rounds
    # otherwise, and gains little there, compared with the passes.
    fused = True if device.type == "cuda" or config.offload else None
    return torch.optim.AdamW(
        trained, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step, counted from 0.

    lr · (step + 1) / warmup_steps during warm-up, then from lr to min_lr_ratio · lr along a line or
    half a cosine, which would end at step `total_steps`. From there on these are the formulas of
    transformers' schedules linear and cosine_with_min_lr.
    """
    warmup = config.warmup_steps
    if step < warmup or config.schedule == "constant":
        return config.lr * min(1.0, (step + 1) / (warmup or 1))
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
