"""The routed loss and its gradients in one pass over the vocabulary, chunk by chunk.

trainer.py calls `routed_loss` with the student's hidden states, the head, and the teacher's hidden
states at routed tokens. No (tokens, vocab) tensor is made, the forward pass computes the gradients
and recomputes nothing, and the teacher's head runs on routed tokens only. fused_torch.py and
fused_triton.py are the two implementations, `loss.backend` chooses.
"""

import os
from importlib.util import find_spec

import torch

from ..schemas.configs import LossConfig
from ..schemas.errors import InputError
from .fused_torch import (
    BUFFER_BYTES,
    Call,
    TorchRoutedLoss,
    buffer_rows,
    floored,
    project,
    wide,
)
from .losses import DIVERGENCES, Head, LossInputs, LossOutput


def routed_loss(
    hidden: torch.Tensor,
    head: Head,
    inputs: LossInputs,
    config: LossConfig,
    kl_weight: float = 0.0,
    grpo_weight: float = 1.0,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: Head | None = None,
) -> LossOutput:
    """TRACE's objective (arXiv 2605.10194; METHOD.md, "Objective") for one micro-batch.

    hidden: (tokens, hidden) states that predict the tokens, with gradient. kl_weight: λ_k;
    grpo_weight: 1 − λ_k / w0, GRPO's on routed tokens. teacher_hidden: (routed, hidden) in the
    order of the tokens whose route is not GRPO; None when λ is 0 or nothing is routed. Sums are at
    least float32 for inputs of any type. Logits of −∞ are masked entries: see `losses.FLOOR`.

    Raises:
        InputError: config.backend is triton, which can't run here.
    """
    call = Call(inputs, config, kl_weight, grpo_weight, head, teacher_head)
    function = TorchRoutedLoss
    if _runs_triton(hidden, config):
        from .fused_triton import TritonRoutedLoss as function
    outputs = function.apply(hidden, head.weight, head.bias, teacher_hidden, call)
    return LossOutput(*outputs)  # pyright: ignore


def _runs_triton(hidden: torch.Tensor, config: LossConfig) -> bool:
    """Whether the kernels of fused_triton.py compute the loss."""
    if config.backend == "torch" or (config.backend == "auto" and not hidden.is_cuda):
        return False
    if find_spec("triton") is None:
        why = "is not installed; `pip install triton`, or set it to torch"
    elif torch.__version__ < "2.10":  # whose addmm adds no bfloat16 products to a float32 sum
        why = f"needs PyTorch 2.10 or newer, and this is {torch.__version__}; set it to torch"
    elif not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        why = "needs a CUDA device; set it to auto or torch"
    else:
        from .fused_kernels import TERMS

        missing = ", ".join(route.label for route in DIVERGENCES.keys() - TERMS.keys())
        if not missing:
            return True
        why = f"has no form of {missing}; add it to TERMS in trace/fused_kernels.py, or use torch"
    if config.backend == "auto":
        return False
    raise InputError(f"loss.backend: triton {why}")


@torch.no_grad()
def token_logprobs(
    hidden: torch.Tensor,
    head: Head,
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    fp32_logits: bool = False,
) -> torch.Tensor:
    """Log-probabilities of tokens, (tokens,) float32, computed chunk by chunk.

    hidden: (tokens, hidden); token_ids, temperature: (tokens,); fp32_logits: as in LossConfig.
    trainer.py scores the base policy with it.
    """
    head = head.cast(hidden.dtype)
    rows = buffer_rows(hidden, head, BUFFER_BYTES)
    out = []
    for states, ids, heat in zip(
        hidden.split(rows), token_ids.split(rows), temperature.split(rows), strict=True
    ):
        logits = torch.empty(
            len(states), len(head.weight), dtype=wide(hidden), device=hidden.device
        )
        project(states, head, logits, fp32_logits)
        log_p = torch.log_softmax(head.shape_(logits, heat[:, None]), -1)
        out.append(floored(log_p.gather(1, ids[:, None]).squeeze(1)))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=wide(hidden))
