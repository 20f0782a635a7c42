"""How a decoder's norms, rotary embeddings and SwiGLU are computed: `train.layers`.

start.py calls `fuse_layers` for the student and its frozen copies, before they are sharded.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.utils._triton import has_triton
from transformers import AttentionInterface

from ..schemas.configs import Layers
from ..schemas.errors import InputError
from ..schemas.extras import require
from .attention import ATTENTION, packed_attention
from .lora import transformers_model
from .policy import decoder_layers


def fuse_layers(model: Any, layers: Layers, device: torch.device) -> None:
    """Make a model compute its layers by fused kernels; eager: as they are.

    Raises:
        InputError: Liger's package or its kernels for this architecture are missing; no Triton.
    """
    if layers == "eager":
        return
    interpreted = layers == "liger" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and not has_triton():
        raise InputError(
            f"train.layers={layers}: this GPU has no Triton; set train.layers=eager, or install it "
            "(pip install triton)"
        )
    if layers == "compile":
        _compile(model)
    elif device.type == "cuda" or interpreted:
        _patch(model)
    else:
        raise InputError(
            f"train.layers=liger: its kernels need a CUDA device, and the policy is on {device}; "
            "set train.layers=eager or compile"
        )


def _compile(model: Any) -> None:
    """Compile each layer for packed rows of any length, with its attention left out.

    Layers of one kind share their code. Parameters keep their names.
    """
    # Here, because it imports the compiler.
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))
    for layer in decoder_layers(model):
        # Not the module: FSDP's hooks then stay outside.
        compiled = torch.compile(layer.forward, dynamic=True)
        layer.forward = partial(_forward, layer.forward, compiled)


def _forward(plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any):
    """Sampling, whose cache grows with each token, is not compiled."""
    return (plain if kwargs.get("packed") is None else compiled)(*args, **kwargs)


def _patch(model: Any) -> None:
    """Bind Liger's kernels to the modules of a model.

    Rotary embeddings are replaced for every model of the architecture in this process.
    """
    require("liger_kernel")
    monkey_patch = import_module("liger_kernel.transformers.monkey_patch")
    plain = transformers_model(model)
    kind = plain.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"policy {kind}: Liger has no kernels for this architecture; set train.layers=eager or "
            "compile"
        )
    # The loss is trace-opd's own.
    monkey_patch._apply_liger_kernel_to_instance(
        model=plain, fused_linear_cross_entropy=False, cross_entropy=False
    )
