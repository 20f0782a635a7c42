"""The routed loss on a GPU: matrix products around two Triton kernels, logits in place.

fused.py calls it for states on CUDA; fused_torch.py is the reference. A chunk is a slice of tokens.
Its logits, then those of the teacher at its routed tokens, are one buffer in the states' type.
`statistics` reads each row once; losses.py turns the statistics into slopes; `gradient` overwrites
the student's rows with d loss / d logits, and the products of the head follow. Nothing waits for
the device: the host knows the routes.

A chunk launches three products, four with a teacher; `statistics` once for each of the two; and
`gradient` once a route. In bfloat16 the kernels read and write 6 bytes a logit, of a token with a
divergence 8, of its teacher 6, of a reweighted token's teacher 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..schemas.labels import Route
from . import fused_kernels
from .fused_call import Call, chunk_sizes, wide
from .fused_kernels import TERMS, TYPES
from .losses import LossOutput
from .policy_losses import policy_loss, reweighted_advantage

# Any: Triton's types know no launch options.
statistics: Any = fused_kernels.statistics
gradient: Any = fused_kernels.gradient

# Bytes of a chunk's logits: 2,048 tokens of a vocabulary of 151,936 with a quarter routed.
BUFFER_BYTES = 768 << 20
# Vocabulary entries per step of a kernel: one load of 16 bytes in bfloat16 by each of its threads.
BLOCK, WARPS = 2048, 8
_ALIGN = 64  # entries: rows start at multiples of 128 bytes whatever the vocabulary


class TritonRoutedLoss(torch.autograd.Function):
    """See fused.routed_loss. The backward pass is the identity: the loss's factor has to be 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, teacher_hidden: Any, call: Call):
        inputs, config, kind = call.inputs, call.config, wide(hidden)
        head = call.head.cast(hidden.dtype)
        teacher_head = call.teacher_head.cast(hidden.dtype) if call.teacher_head else head
        tokens, vocab, device = len(hidden), len(weight), hidden.device
        hosts = call.routes(teacher_hidden is not None)
        taught = hosts != Route.GRPO
        stride = -(-vocab // _ALIGN) * _ALIGN
        stored = kind if config.fp32_logits else hidden.dtype
        most = max(2, BUFFER_BYTES // (stride * stored.itemsize))
        sizes = chunk_sizes(taught, most)
        buffer = torch.empty(
            min(most, tokens + int(taught.sum())), stride, dtype=stored, device=device
        )
        slopes = buffer.view(hidden.dtype)  # a row's slopes start where its logits do
        out = {name: torch.zeros(tokens, dtype=kind, device=device) for name in LossOutput._fields}
        lse, teacher_lse, teacher_entropy, taught_logprobs, lift, value = torch.zeros(
            6, tokens, dtype=kind, device=device
        )
        kl_lift, policy_weight, route, rows = value, inputs.weight, None, None
        if taught.any():
            route = inputs.route
            diverges = (route != Route.GRPO) & (route != Route.REWEIGHT)
            # Routed tokens return to GRPO as the KL fades; REWEIGHT's never leave it.
            policy_weight = torch.where(diverges, call.grpo_weight * inputs.weight, inputs.weight)
            kl_lift = torch.where(diverges, call.kl_weight * inputs.weight, 0.0)
            rows = torch.where(route != Route.GRPO, (route != Route.GRPO).cumsum(0) - 1, -1)
        heat = inputs.temperature.to(kind).reciprocal()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            summed = torch.promote_types(weight.dtype, hidden.dtype)
            grad_weight = torch.empty(weight.shape, dtype=summed, device=device)
            if not tokens:
                grad_weight.zero_()
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros(vocab, dtype=kind, device=device)
        shape: dict[str, Any] = {"STRIDE": stride, "VOCAB": vocab, "WIDE": TYPES[kind]}
        shape |= {"BLOCK": BLOCK, "num_warps": WARPS}
        first = base = 0
        for size in sizes:
            at = slice(first, first + size)
            present = set(hosts[at].tolist())
            count = int(taught[at].sum())
            logits, teacher = buffer[:size, :vocab], buffer[size : size + count, :vocab]
            with _exact_sums():
                _product(logits, hidden[at], head.weight.T)
                if count:
                    states = teacher_hidden[base : base + count]
                    _product(teacher, states, teacher_head.weight.T)
            statistics[(size,)](
                logits, head.bias, inputs.token_ids, heat, None, lse, out["entropy"],
                out["logprobs"], first, 0, CAP=head.softcap, **shape,
            )  # fmt: skip
            advantage, logprobs = inputs.advantage[at], out["logprobs"][at]
            if count:
                statistics[(size,)](
                    teacher, teacher_head.bias, inputs.token_ids, heat, rows, teacher_lse,
                    teacher_entropy, taught_logprobs, first, base, CAP=teacher_head.softcap,
                    **shape,
                )  # fmt: skip
                if config.entropy_beta:
                    kl_lift[at] *= torch.exp(-config.entropy_beta * teacher_entropy[at])
            if int(Route.REWEIGHT) in present:
                scaled = reweighted_advantage(
                    advantage, logprobs, taught_logprobs[at], call.kl_weight, config
                )
                advantage = torch.where(inputs.route[at] == Route.REWEIGHT, scaled, advantage)
            out["loss"][at], lift[at], out["ratio_clipped"][at], out["reference_kl"][at] = (
                policy_loss(logprobs, advantage, policy_weight[at], inputs, at, config)
            )
            for code in sorted(present):
                gradient[(size,)](
                    logits, head.bias, slopes, teacher, teacher_head.bias, inputs.token_ids, heat,
                    rows, route, lse, teacher_lse, out["logprobs"], lift, kl_lift, value, out["kl"],
                    out["kl_clipped"], first, base, code, TERM=TERMS.get(Route(code)),
                    CLIP=config.kl_clip.value, BOUND=config.kl_clip_value, BETA=config.jsd_beta,
                    NARROW=stored != hidden.dtype, CAP=head.softcap,
                    TEACHER_CAP=teacher_head.softcap, **shape,
                )  # fmt: skip
            slope = slopes[:size, :vocab]
            with _exact_sums():
                if grad_hidden is not None:
                    _product(grad_hidden[at], slope, head.weight)
                if grad_weight is not None:
                    _product(grad_weight, slope.T, hidden[at], keep=first > 0)
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=kind)
            first, base = first + size, base + count
        if taught.any():
            out["loss"] += kl_lift * value
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        loss = out.pop("loss").sum()
        ctx.mark_non_differentiable(*out.values())
        return loss, *out.values()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        torch._assert_async(  # pyright: ignore
            grad_outputs[0] == 1, "scale the loss's token weights, or set loss.backend=torch"
        )
        gradients = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


@contextmanager
def _exact_sums() -> Iterator[None]:
    """Products of bfloat16 are summed in float32: the hidden states' run over the vocabulary."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def _product(out: torch.Tensor, one: torch.Tensor, other: torch.Tensor, keep: bool = False) -> None:
    """out = one · other, + out if `keep`; `out` may have a wider type."""
    if out.dtype == one.dtype:
        torch.addmm(out, one, other, beta=float(keep), out=out)
    elif out.is_cuda:
        torch.addmm(out, one, other, out_dtype=out.dtype, beta=float(keep), out=out)
    else:  # Triton's interpreter: PyTorch has no such product on CPU
        torch.addmm(out, one.to(out.dtype), other.to(out.dtype), beta=float(keep), out=out)
