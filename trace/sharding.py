"""Sharding: weights placed on a device layer by layer, and split over the ranks by FSDP2.

trainer.py builds the student and its frozen copies here. A model starts without weights of its own
(`skeleton`, or loaded on meta). `place` gives it one layer's whole tensors at a time and shards
them before the next layer's arrive, so no device holds a whole copy.

The recipe of precision, the same for one rank and many: trained weights are float32; forward and
backward passes compute in the compute type with weights cast to it; gradients are summed over
micro-batches and ranks in float32. Source: FSDP2's MixedPrecisionPolicy.
"""

import atexit
import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from .policy import decoder_layers
from .ranks import BACKENDS, Ranks, local_tensor, whole_tensor

# (name, placeholder) -> the whole tensor on this rank; called in the same order on every rank.
Source = Callable[[str, torch.Tensor], torch.Tensor]
# (placeholder, whole tensor) -> the type in which to keep it.
Stored = Callable[[torch.Tensor, torch.Tensor], torch.dtype]


class Weights(Protocol):
    """What has parameters: a module, or a view of some of its parameters."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


def skeleton(model: torch.nn.Module) -> Any:
    """A frozen copy of a model's modules and settings, with all its tensors on meta.

    The model must not be sharded yet.
    """
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def place(
    module: torch.nn.Module,
    source: Source,
    stored: Stored,
    device: torch.device,
    ranks: Ranks,
    compute_dtype: torch.dtype,
    offload: bool = False,
) -> None:
    """Give a module its tensors, sharded if `Ranks.shards` says so. Every rank has to call.

    module: a PackedModel; parameters, tied ones included, and buffers are replaced by new tensors
    on `device`. offload: this rank's shards and their gradients are in the host's memory, and
    `device` has a layer while it computes (FSDP2's CPUOffloadPolicy).
    """
    units: list[torch.nn.Module] = [module]
    fsdp: dict[str, Any] = {}
    if ranks.shards(compute_dtype):
        units = [*decoder_layers(module.model), module]
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        fsdp = {"mesh": _mesh(ranks, device), "mp_policy": precision}
        if offload:
            fsdp["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    tensors = _Tensors(module, source, stored, device)
    for unit in units:
        tensors.place(unit)
        if fsdp:
            fully_shard(unit, **fsdp)


def place_whole(
    module: torch.nn.Module, source: Source, stored: Stored, device: torch.device
) -> None:
    """Give a module its tensors, not sharded. Every rank has to call."""
    _Tensors(module, source, stored, device).place(module)


def remove_weights(module: torch.nn.Module) -> None:
    """Free a module's tensors: they go back to meta, and `place_whole` may give it new ones."""
    _Tensors(module, lambda _, tensor: tensor, frozen_types(None), torch.device("meta")).place(
        module
    )


class _Tensors:
    """New tensors for a module's parameters and buffers; tied ones stay one tensor."""

    def __init__(
        self, module: torch.nn.Module, source: Source, stored: Stored, device: torch.device
    ) -> None:
        self._source, self._stored, self._device = source, stored, device
        # With the tensor itself, which keeps its id from being given to another.
        self._names = {id(tensor): (name, tensor) for name, tensor in _named(module)}

    @torch.no_grad()
    def place(self, unit: torch.nn.Module) -> None:
        """Replace those of a part of the module that are not replaced yet."""
        placed: dict[int, torch.Tensor] = {}
        for part in unit.modules():
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is None or id(tensor) not in self._names:
                        continue
                    if id(tensor) not in placed:
                        placed[id(tensor)] = self._new(tensor)
                    tensors[key] = placed[id(tensor)]  # type: ignore[assignment]

    def _new(self, tensor: torch.Tensor) -> torch.Tensor:
        name, _ = self._names[id(tensor)]
        whole = self._source(name, tensor)
        new = whole.to(self._device, self._stored(tensor, whole), copy=True)
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, tensor.requires_grad)
        return new


def trained_types(tensor: torch.Tensor, whole: torch.Tensor) -> torch.dtype:
    """float32 for what is trained; the source's type for the rest."""
    return torch.float32 if tensor.requires_grad else whole.dtype


def frozen_types(dtype: torch.dtype | None) -> Stored:
    """One type for all parameters; None: the source's."""

    def stored(tensor: torch.Tensor, whole: torch.Tensor) -> torch.dtype:
        return dtype if dtype and isinstance(tensor, torch.nn.Parameter) else whole.dtype

    return stored


def from_first_rank(ranks: Ranks, device: torch.device) -> Source:
    """The first rank's tensors, broadcast. Other ranks' placeholders have their shape and type."""

    def whole(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if ranks.count == 1:
            return tensor
        sent = tensor if ranks.first else torch.empty_like(tensor, device=device)
        sent = sent.detach().to(device).contiguous()
        dist.broadcast(sent, src=0)
        return sent

    return whole


def from_module(module: torch.nn.Module) -> Source:
    """The tensors of a module with the same names, gathered one at a time."""
    tensors = dict(_named(module))
    return lambda name, _: whole_tensor(tensors[name])


@torch.no_grad()
def copy_weights(source: Weights, target: Weights) -> None:
    """Copy parameters between two modules of the same architecture, sharded alike or not at all."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        local_tensor(ours).copy_(local_tensor(theirs))


@torch.no_grad()
def average_weights(source: Weights, target: Weights, rate: float) -> None:
    """Move parameters towards those of a module as in `copy_weights` by a share of the distance."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        mine = local_tensor(ours)
        mine.lerp_(local_tensor(theirs).to(mine.device, mine.dtype), rate)


def reshard(module: Any) -> None:
    """Free the gathered weights that a pass without gradients leaves at a sharded module's root."""
    if isinstance(module, FSDPModule):
        module.reshard()


def _named(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, also those that a state dict leaves out."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _mesh(ranks: Ranks, device: torch.device) -> DeviceMesh:
    if not dist.is_initialized():  # one rank without torchrun
        backend = BACKENDS[device.type]
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    return init_device_mesh(device.type, (ranks.count,))
