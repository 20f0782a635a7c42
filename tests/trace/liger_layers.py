"""Liger's kernels in Triton's interpreter against transformers' layers; test_layers.py runs it.

    TRITON_INTERPRET=1 python tests/trace/liger_layers.py

The interpreter has to be chosen before Triton is imported, hence a process of its own.
"""

import copy

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from triton.runtime import interpreter

from trace_opd.trace.layers import fuse_layers
from trace_opd.trace.packing import PackedModel, pack
from trace_opd.trace.policy import checkpoint_layers
from trace_opd.trace.sharding import skeleton

ROW = pack([[5, 6], [5, 6], [7]], [np.array([8, 9, 10]), np.array([11]), np.array([12, 13])])
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Scalar(float):
    """Triton's interpreter passes numbers as they are, and Liger's kernels convert theirs."""

    def to(self, _: object) -> "Scalar":
        return self


def pass_of(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The states of ROW, and gradients of a function that weighs each entry differently."""
    states = PackedModel(model)(ROW, lambda states, _: states)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * weights).sum().backward()
    return states, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def complete_interpreter() -> None:
    """Give Triton's interpreter what Liger's kernels use and it lacks."""
    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda x: Scalar(x) if type(x) is float else convert(x)
    # From a CUDA library that the interpreter lacks; looked up at the call, when it is replaced.
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)


def main() -> None:
    complete_interpreter()
    for kind, config in ((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)):
        torch.manual_seed(0)
        model = kind(config(**SIZES)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.3)
        fused = copy.deepcopy(model)
        expected, gradients = pass_of(model)
        fuse_layers(fused, "liger", torch.device("cpu"))
        checkpoint_layers(fused)
        got, own = pass_of(fused)
        assert "Liger" in repr(fused), kind
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (own[name] - gradient).norm() <= 1e-4 * gradient.norm(), (kind, name)
        assert not torch.equal(got, expected), f"{kind}: no kernel ran"
        skeleton(fused)  # frozen copies are made of a patched model


if __name__ == "__main__":
    main()
