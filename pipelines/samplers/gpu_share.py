"""The share of a GPU's memory that a vLLM engine may take, from what is free when it opens."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ...schemas.errors import InputError

_GIB = 2**30


def free_share(trained: Any = None, ahead: bool = False) -> float:
    """`engine_share` of this process's current GPU. trained: the model in training, if any."""
    torch.cuda.empty_cache()  # what PyTorch holds without need counts as free
    free, total = torch.cuda.mem_get_info()
    return engine_share(free, total, 0 if trained is None else trained_bytes(trained), ahead)


def engine_share(free: int, total: int, trained: int, ahead: bool) -> float:
    """An engine's share of a GPU's memory. free, total: bytes; trained: of the trained weights.

    Nine tenths of what is free. AdamW's two states come with the first step, after the engine has
    opened, and stay. ahead: the engine is awake while a step trains, so half is for gradients and
    activations.

    Raises:
        InputError: nothing is free next to the trainer.
    """
    room = free - (3 if ahead else 2) * trained
    share = (0.5 if ahead else 0.9) * room / total
    if share < 0.01:
        raise InputError(
            f"sampler vllm: {free / _GIB:.1f} GiB of the GPU's {total / _GIB:.1f} GiB are free, "
            f"and the optimiser takes {2 * trained / _GIB:.1f} GiB, which leaves none for the "
            "engine; train adapters (lora), take more GPUs or servers on others "
            "(sampler.engine=openai)"
        )
    return int(share * 1000) / 1000


def trained_bytes(model: Any) -> int:
    """Bytes of the trained weights on this rank: of its shards, if they are sharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trained)
