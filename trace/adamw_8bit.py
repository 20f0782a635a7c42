"""AdamW with moments of 8 bits: torchao's update and codes, with blocks that can be sharded.

torchao cuts its blocks over a rank's part of a tensor. So which tensors have 8 bits, and the blocks
themselves, depend on the number of ranks. Here a block is 64 values of one row, and a state is the
same under any number of ranks. It is made of plain tensors, sharded like their parameter:

    exp_avg, exp_avg_sq                (rows, columns) uint8     codes
    exp_avg_scale, exp_avg_sq_scale    (rows, columns / 64)      float32, one for each block
    step                               ()

A small tensor has float32 moments, as in torch.optim.AdamW. Source: 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861).
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.distributed.tensor
from torch.distributed.tensor import DTensor

from ..schemas.extras import require
from .ranks import local_tensor

BLOCK = 64  # values that share a scale
_SMALLEST = 4096  # values; the limit of torchao and bitsandbytes
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
_SCALE = "_scale"


class AdamW8bit(torch.optim.Optimizer):
    """See the module. On a GPU torch.compile fuses each update; on the CPU nothing is compiled.

    Raises:
        InputError: torchao is not installed.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults)
        require("torchao")
        self.register_load_state_dict_post_hook(_restore_types)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are computed before"
        # One program per shape; PyTorch's limit is lower than the number of shapes in a model.
        with torch._dynamo.utils.disable_cache_limit():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)

    def _update(
        self, parameter: torch.nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state |= _new_state(parameter)
        state["step"] += 1
        weights = local_tensor(parameter)
        if not weights.numel():  # more ranks than rows
            return
        first, second = (_moment(state, name, weights) for name in _SIGNED)
        update = _torchao("adam").single_param_adam
        if weights.device.type != "cpu":
            update = torch.compile(update, fullgraph=True, dynamic=False)
        update(
            weights,
            local_tensor(gradient),
            state["step"],
            first,
            second,
            None,
            torch.tensor(group["lr"]),  # a number would be compiled into the program
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,  # decoupled weight decay
            False,  # no stochastic rounding
        )


def has_8_bits(parameter: torch.Tensor) -> bool:
    """Whether a parameter's moments have 8 bits."""
    return parameter.ndim > 1 and parameter.numel() >= _SMALLEST and not parameter.shape[-1] % BLOCK


def _new_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(0.0)}
    for name in _SIGNED:
        if has_8_bits(parameter):
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[name + _SCALE] = _scales(parameter)
        else:
            state[name] = torch.zeros_like(parameter)
    return state


def _scales(parameter: torch.Tensor) -> torch.Tensor:
    shape = (*parameter.shape[:-1], parameter.shape[-1] // BLOCK)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return torch.distributed.tensor.zeros(shape, device_mesh=mesh, placements=placements)
    return torch.zeros(shape, device=parameter.device)


def _moment(state: dict[str, torch.Tensor], name: str, weights: torch.Tensor) -> torch.Tensor:
    """This rank's part of a moment, in the state's own memory."""
    codes = local_tensor(state[name])
    if name + _SCALE not in state:
        return codes
    scale = local_tensor(state[name + _SCALE]).view(-1)
    values = _values(_SIGNED[name], weights.device)
    return _torchao("subclass_8bit").OptimState8bit(
        codes, scale, values, _SIGNED[name], weights.dtype
    )


@cache
def _values(signed: bool, device: torch.device) -> torch.Tensor:
    """The values of the 256 codes, as shares of a block's scale."""
    states = _torchao("subclass_8bit")
    values = states.get_qmap_signed() if signed else states.get_qmap_unsigned()
    return torch.tensor(values, device=device)


def _restore_types(optimizer: torch.optim.Optimizer) -> None:
    """`load_state_dict` casts a state to its parameter's type."""
    for state in optimizer.state.values():
        for name in _SIGNED:
            if name + _SCALE in state:
                state[name] = state[name].to(torch.uint8)


def _torchao(module: str) -> Any:
    require("torchao")
    return import_module(f"torchao.optim.{module}")
