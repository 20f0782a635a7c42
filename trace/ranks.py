"""Ranks: the trainer's use of torch.distributed, with one process or many under torchrun.

trainer.py, checkpoint.py and online.py call it. Every rank knows all sequences of a step and trains
on its share; sharding.py splits weights, gradients and optimiser states over them.

Ranks have two process groups. The devices' (NCCL, on the CPU gloo) carries weights and gradients,
and gives up on a rank that is late by minutes. The other one (gloo) carries objects and numbers,
and there ranks wait while one of them annotates or writes: `TrainConfig.wait_hours`. So a rank that
was alone at work calls a method of `Ranks` before its next collective on the devices.
"""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from ..schemas.environment import whole_number
from ..schemas.errors import InputError

# With gloo in addition to NCCL the norm of gradients that are offloaded to the host can be reduced.
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a training.

    waiting: the gloo group of every method; None: the default group.
    """

    index: int = 0
    count: int = 1
    waiting: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.index == 0

    def shards(self, compute_dtype: torch.dtype) -> bool:
        """Whether weights are sharded: over several ranks, and on one that computes in a lower
        precision than its weights'.
        """
        return self.count > 1 or compute_dtype != torch.float32

    def wait(self) -> None:
        """Until every rank has called."""
        if self.count > 1:
            dist.barrier(self.waiting)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks; the same list on each."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def most(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks; the same list on each."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.count == 1:
            return [value]
        out: list[Any] = [None] * self.count
        dist.all_gather_object(out, value, group=self.waiting)
        return out

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.waiting)
        return tensor.tolist()


def join_ranks(
    device: str, wait_hours: float = 72, device_timeout: timedelta | None = None
) -> Ranks:
    """The ranks of this torchrun, joined on first use; a single rank without torchrun.

    wait_hours: how long a rank waits for the others. device_timeout: how long it waits in a
        collective on the devices; None: PyTorch's default. The first call sets it.

    Raises:
        InputError: torch.distributed cannot start with torchrun's settings.
    """
    if whole_number("WORLD_SIZE", 1) <= 1:
        return Ranks()
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(whole_number("LOCAL_RANK", 0))
        try:
            dist.init_process_group(BACKENDS[device], timeout=device_timeout)
        except ValueError as error:
            raise InputError(f"torch.distributed: {error}; start with torchrun") from None
        # Gloo's threads abort the process if they still run when the interpreter has ended.
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size(), _waiting_group(wait_hours))


def first_to_end() -> bool:
    """Whether no other rank of this torchrun has called: the one that says why a training ends.

    The others end too, when their connections to it close.
    """
    try:
        return _store().add("trace-opd/ended", 1) == 1
    except (RuntimeError, ValueError, OSError):  # unknown, or its process has ended
        return dist.is_initialized() or os.environ.get("RANK", "0") == "0"


def _store() -> Any:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("no process but the first rank's holds a store")
    return next(iter(rendezvous("env://", timeout=timedelta(seconds=10))))[0]


@cache
def _waiting_group(hours: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=hours))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without gradient, gathered if it is sharded; then every rank has to call."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards are gathered on the devices, whose network is the faster one.
    tensor = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory; all of it if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
