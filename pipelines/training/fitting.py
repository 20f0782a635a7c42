"""What to change in a training so that it fits a GPU's memory. plan_table.py prints it.

Tried in this order, each with the fewest layers recomputed: nothing else, 8-bit AdamW, adapters,
more GPUs. The first costs seconds alone; adapters train another model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...schemas.configs import TrainConfig
from ...schemas.settings import override
from .plan import predict_memory
from .plan_setting import Setting, setting

# A card of 80 GB has 85.5e9 bytes or less; the rest is for CUDA's context and the allocator.
_USABLE = 0.93
_MOST_GPUS = 64


@dataclass(frozen=True)
class Fit:
    """A setting that fits, and its overrides of the config."""

    where: Setting
    overrides: list[str]

    def __str__(self) -> str:
        return " ".join(self.overrides)


def usable_bytes(memory_gb: float | None = None) -> int | None:
    """Bytes for a training on a card of so many GB (10⁹ bytes); None: on this machine's.

    Returns None where there is no card.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if not torch.cuda.is_available():
        return None
    return int(_USABLE * torch.cuda.get_device_properties(0).total_memory)


def fewest_recomputed(where: Setting, limit: int) -> Setting | None:
    """The setting with the fewest layers recomputed that fits; None if it does not with all."""
    for count in range(where.shape.layers + 1):
        config = where.config.model_copy(update={"gradient_checkpointing": count})
        tried = replace(where, config=config)
        if predict_memory(tried).peak <= limit:
            return tried
    return None


def settled(where: Setting, limit: int | None) -> Setting:
    """The setting with the number of layers that gradient_checkpointing=auto stands for.

    limit: bytes; None: no card, so nothing is recomputed. If nothing fits, all layers are.
    """
    if where.config.gradient_checkpointing != "auto":
        return where
    if limit is not None and (fitting := fewest_recomputed(where, limit)) is not None:
        return fitting
    config = where.config.model_copy(update={"gradient_checkpointing": limit is not None})
    return replace(where, config=config)


def fits(where: Setting, limit: int) -> Iterator[Fit]:
    """Changes with which a setting fits, in the order in which they are tried."""
    for overrides, tried in _changes(where):
        fitting = fewest_recomputed(tried, limit)
        if fitting is not None:
            yield Fit(fitting, [*overrides, _recomputation(fitting)])
    gpus = 2 * where.gpus
    while gpus <= _MOST_GPUS:
        fitting = fewest_recomputed(replace(where, gpus=gpus), limit)
        if fitting is not None:
            yield Fit(fitting, [f"--gpus {gpus}", _recomputation(fitting)])
            return
        gpus *= 2


def _changes(where: Setting) -> Iterator[tuple[list[str], Setting]]:
    config = where.config
    yield [], where
    if config.optim.kind != "adamw_8bit" and not config.optim.offload:
        yield _changed(where, ["optim.kind=adamw_8bit"])
    if config.lora is None:
        offload = ["optim.offload=false"] if config.optim.offload else []
        yield _changed(where, ["lora.rank=32", *offload])


def _changed(where: Setting, overrides: list[str]) -> tuple[list[str], Setting]:
    """Overrides, and the setting with them."""
    config: TrainConfig = override(where.config, overrides)
    changed = setting(config, where.gpus, where.prompt_tokens, where.response_tokens)
    return overrides, replace(changed, device=where.device, bfloat16=where.bfloat16)


def _recomputation(where: Setting) -> str:
    count, layers = where.recomputed_layers, where.shape.layers
    value = {0: "false", layers: "true"}.get(count, str(count))
    return f"gradient_checkpointing={value}"
