"""Ranks: the trainer's use of torch.distributed, with one process or many under torchrun.

trainer.py, checkpoint.py and online.py call it. Every rank knows all sequences of a step and trains
on its share; sharding.py splits weights, gradients and optimiser states over them.
"""

import atexit
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..schemas.environment import whole_number
from ..schemas.errors import InputError

# With gloo beside NCCL the norm of gradients that are offloaded to the host can be reduced.
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a training."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def shards(self, compute_dtype: torch.dtype) -> bool:
        """Whether weights are sharded: over several ranks, and on one that computes in a lower
        precision than its weights'.
        """
        return self.count > 1 or compute_dtype != torch.float32

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise sum over ranks; the same list on each."""
        return self._reduce(values, device, dist.ReduceOp.SUM)

    def most(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise maximum over ranks; the same list on each."""
        return self._reduce(values, device, dist.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.count == 1:
            return [value]
        out: list[Any] = [None] * self.count
        dist.all_gather_object(out, value)
        return out

    def _reduce(self, values: list[float], device: torch.device, op: Any) -> list[float]:
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def join_ranks(device: str) -> Ranks:
    """The ranks of this torchrun, joined on first use; a single rank without torchrun.

    Raises:
        InputError: torch.distributed cannot start with torchrun's settings.
    """
    if whole_number("WORLD_SIZE", 1) <= 1:
        return Ranks()
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(whole_number("LOCAL_RANK", 0))
        try:
            dist.init_process_group(BACKENDS[device])
        except ValueError as error:
            raise InputError(f"torch.distributed: {error}; start with torchrun") from None
        # Gloo's threads abort the process if they still run when the interpreter has ended.
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without gradient, gathered if it is sharded; then every rank has to call."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards are gathered on the devices, whose network is the faster one.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory; all of it if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
