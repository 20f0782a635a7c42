"""The routed loss and its gradients in PyTorch's own operations: on CPU, and as the reference.

One buffer holds a chunk's logits, the teacher's after the student's, and the gradient overwrites
them. Between the matrix products they are processed in blocks of rows of one route that fit the
cache (fused_block.py).
"""

from typing import Any

import numpy as np
import torch

from ..schemas.labels import Route
from .fused_block import logits_to_gradient
from .fused_call import Call, chunk_sizes, wide
from .losses import Head, LossOutput

# Bytes of a chunk's logits, student's and teacher's together, and of a block between the products.
# On CUDA the products need long chunks; on CPU a block has to fit the cache.
BUFFER_BYTES = {"cpu": 120 << 20, "cuda": 1 << 30}
BLOCK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 27}
# Vocabulary entries per step where the weight gradient is summed in a wider type.
_VOCAB_SLICE = 8192
# Vocabulary entries per product of logits on CPU: with few rows BLAS is slow on the full head.
_CPU_SLICE = 1024


class TorchRoutedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, teacher_hidden: Any, call: Call):
        kind, fp32 = wide(hidden), call.config.fp32_logits
        # Cast once for all chunks if the head is stored in a wider type than it computes in.
        head = call.head.cast(hidden.dtype)
        teacher_head = call.teacher_head and call.teacher_head.cast(hidden.dtype)
        statistics = {
            name: torch.zeros(len(hidden), dtype=kind, device=hidden.device)
            for name in LossOutput._fields
        }
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Not zeroed: the first chunk overwrites it, which saves a pass over the head.
        grad_weight = torch.empty_like(weight, dtype=kind) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=kind) if ctx.needs_input_grad[2] else None
        rows = min(buffer_rows(hidden, call.head, BUFFER_BYTES), max(len(hidden), 2))
        step = min(buffer_rows(hidden, call.head, BLOCK_BYTES), rows)
        # The block's log-probabilities. Allocated per block, their pages would fault in each time.
        scratch = torch.empty(2, step, len(weight), dtype=kind, device=hidden.device)
        buffer = torch.empty(rows, len(weight), dtype=kind, device=hidden.device)
        heated = call.inputs.heated
        if heated is None:
            heated = bool((call.inputs.temperature != 1).any())
        written = False
        scored = call.inputs.scores is not None  # in the teacher's place
        for positions, taught, parts in _chunks(call, scored, teacher_hidden is not None, rows):
            states = hidden[positions]  # (chunk, hidden)
            logits = buffer[: len(states)]  # (chunk, vocab)
            project(states, head, logits, fp32)
            teacher_logits = None
            if len(taught) and not scored:
                assert teacher_head is not None, "a teacher's states need its head"
                teacher_logits = buffer[len(states) : len(states) + len(taught)]
                project(teacher_hidden[taught], teacher_head, teacher_logits, fp32)
            for route, first, last in parts:
                for start in range(first, last, step):
                    block = slice(start, min(start + step, last))
                    routed = route != Route.GRPO
                    logits_to_gradient(
                        logits[block],
                        teacher_logits[block] if routed and teacher_logits is not None else None,
                        taught[block] if routed and scored else None,
                        Route(route),
                        positions[block],
                        call,
                        heated,
                        statistics,
                        scratch,
                    )
            gradient = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[positions] = gradient @ head.weight
            if grad_weight is not None:
                _add_outer(grad_weight, gradient, states, keep=written)
                written = True
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        if grad_weight is not None and not written:
            grad_weight.zero_()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        loss = statistics.pop("loss").sum()
        ctx.mark_non_differentiable(*statistics.values())
        return loss, *statistics.values()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        scale = grad_outputs[0]
        unscaled = scale.device.type == "cpu" and scale.item() == 1  # on CUDA item() synchronises
        # In place: nobody else holds them, and the weight's gradient is as large as the head.
        gradients = (
            None if gradient is None else (gradient if unscaled else gradient.mul_(scale)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _chunks(call: Call, scored: bool, with_teacher: bool, rows: int):
    """(token positions, rows of teacher_hidden or scores, parts) of chunks of at most `rows` rows.

    Positions are sorted by route, routed ones first, so that a chunk's i-th teacher row belongs to
    its i-th token. parts: (route, first, last) of each route's tokens; all GRPO without a teacher.
    """
    device = call.inputs.route.device
    kinds = torch.from_numpy(call.routes(scored or with_teacher))
    routed = kinds != 0
    doubled = np.zeros(len(kinds), bool) if scored else routed.numpy()
    teacher_rows = torch.cumsum(routed.long(), 0) - 1
    for positions in torch.arange(len(kinds)).split(chunk_sizes(doubled, rows)):
        positions = positions[kinds[positions].argsort(descending=True, stable=True)]
        taught = teacher_rows[positions[routed[positions]]]
        values, sizes = torch.unique_consecutive(kinds[positions], return_counts=True)
        lasts = sizes.cumsum(0)
        parts = zip(values.tolist(), (lasts - sizes).tolist(), lasts.tolist(), strict=True)
        yield positions.to(device), taught.to(device), list(parts)


def project(states: torch.Tensor, head: Head, out: torch.Tensor, fp32: bool) -> None:
    """Raw logits (rows, vocab) of states (rows, hidden) into `out`, at least float32.

    fp32: not rounded to the states' type first.
    """
    if out.dtype == states.dtype or (fp32 and out.device.type == "cpu"):
        states = states.to(out.dtype)
        step = _CPU_SLICE if out.device.type == "cpu" else len(head.weight)
        for start in range(0, len(head.weight), step):
            part = slice(start, start + step)
            torch.mm(states, head.weight[part].to(out.dtype).T, out=out[:, part])
    elif fp32:
        torch.mm(states, head.weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(states @ head.weight.T)
    if head.bias is not None:
        out += head.bias


def _add_outer(
    total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor, keep: bool
) -> None:
    """total (vocab, hidden) = gradientᵀ states, summed in the total's type; + total if `keep`."""
    if total.dtype == states.dtype:
        torch.addmm(total, gradient.T, states, beta=float(keep), out=total)
        return
    for start in range(0, len(total), _VOCAB_SLICE):
        part = slice(start, start + _VOCAB_SLICE)
        product = gradient[:, part].T @ states
        total[part] = total[part] + product if keep else product


def buffer_rows(hidden: torch.Tensor, head: Head, budget: dict[str, int]) -> int:
    """Rows of logits within a device's budget of bytes."""
    row_bytes = len(head.weight) * torch.finfo(wide(hidden)).bits // 8
    return max(2, budget.get(hidden.device.type, budget["cuda"]) // row_bytes)
