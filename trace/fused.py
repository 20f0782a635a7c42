"""The routed loss and its gradients in one pass over the vocabulary, chunk by chunk.

trainer.py calls `routed_loss` with the student's hidden states, the head, and the teacher's hidden
states at routed tokens. No (tokens, vocab) tensor is made, the forward pass computes the gradients
and recomputes nothing, and the teacher's head runs on routed tokens only. fused_torch.py and
fused_triton.py are the two implementations, `loss.backend` chooses.
"""

import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from ..schemas.configs import LossConfig
from ..schemas.errors import InputError
from ..schemas.labels import Route, Signal
from .fused_call import Call, floored, wide
from .fused_torch import BUFFER_BYTES, TorchRoutedLoss, buffer_rows, project
from .gates import Limits
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
    teacher_temperature: float | None = None,
    limits: Limits | None = None,
) -> LossOutput:
    """TRACE's objective (arXiv 2605.10194; METHOD.md, "Objective") for one micro-batch.

    hidden: (tokens, hidden) states that predict the tokens, with gradient. kl_weight: λ_k;
    grpo_weight: 1 − λ_k / w0, GRPO's on routed tokens. teacher_hidden: (routed, hidden) in the
    order of the tokens whose route is not GRPO; None when λ is 0 or nothing is routed.
    inputs.scores take their place. teacher_temperature: divides the teacher's logits; None:
    inputs.temperature does. limits: the step before's (`gates.limits_of`), None in the first. Sums
    are at least float32 for inputs of any type. Logits of −∞ are masked entries: see
    `losses.FLOOR`.

    Raises:
        InputError: config.backend is triton, which can't run here; a route needs what scores do not
            have; a gate reads a divergence that a reweighted token does not have.
    """
    call = Call(
        inputs, config, kl_weight, grpo_weight, head, teacher_head, teacher_temperature, limits
    )
    _check_routes(call, teacher_hidden is not None or inputs.scores is not None)
    if config.policy == "gspo":
        call = replace(call, sequence_logratio=_sequence_logratio(hidden, call))
    function = TorchRoutedLoss
    if _runs_triton(hidden, config):
        from .fused_triton import TritonRoutedLoss as function
    outputs = function.apply(hidden, head.weight, head.bias, teacher_hidden, call)
    return LossOutput(*outputs)  # pyright: ignore


def _check_routes(call: Call, with_teacher: bool) -> None:
    """Refuse routes whose tokens have nothing that the config or its gates read."""
    config, scores = call.config, call.inputs.scores
    divergence = Signal.DIVERGENCE in call.reads
    if scores is None and not divergence:
        return
    present = {Route(code) for code in np.unique(call.routes(with_teacher)).tolist()}
    if divergence and Route.REWEIGHT in present:
        raise InputError(
            "loss.gates: a gate of divergence or importance has none to read on tokens of the "
            "action reweight; use another signal, or route to fkl, rkl or jsd"
        )
    if scores is None:
        return
    if config.top_k is not None:
        raise InputError("loss.top_k: scores have their own k; leave top_k null with them")
    if others := sorted(route.label for route in present & (DIVERGENCES.keys() - {Route.FKL})):
        raise InputError(
            f"teacher.scores: tokens are routed to {', '.join(others)}, which need the teacher's "
            "probability of what the student likes, and scores have only what the teacher likes; "
            "route to fkl"
        )
    if Route.REWEIGHT in present and scores.sampled is None:
        raise InputError(
            "teacher.scores: the action reweight needs the teacher's log-probability of the "
            "response's own tokens; use scores that have it, or route to fkl"
        )


def _sequence_logratio(hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """Mean of log p − log p_old over each token's sequence, (tokens,), without gradient.

    It needs the log-probabilities of a sequence before the loss of its first token: one more
    product of the head.
    """
    inputs, config = call.inputs, call.config
    assert inputs.sequence is not None, "policy gspo needs LossInputs.sequence"
    if not len(hidden):
        return inputs.old_logprobs
    logprobs = token_logprobs(
        hidden.detach(), call.head, inputs.token_ids, inputs.temperature, config.fp32_logits
    )
    ratio = logprobs - inputs.old_logprobs
    sums = ratio.new_zeros(2, int(inputs.sequence.max()) + 1)
    sums[0].index_add_(0, inputs.sequence, ratio)
    sums[1].index_add_(0, inputs.sequence, torch.ones_like(ratio))
    return (sums[0] / sums[1])[inputs.sequence]


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
    elif config.top_k is not None:
        why = "has no form of loss.top_k; set it to auto or torch"
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
