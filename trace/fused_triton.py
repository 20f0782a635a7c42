"""The routed loss on a GPU: matrix products around two Triton kernels, logits in place.

fused.py calls it for states on CUDA; fused_torch.py is the reference. A chunk is a slice of tokens.
Its logits, then those of the teacher at its routed tokens, are one buffer in the states' type.
`statistics` reads each row once; losses.py turns the statistics into slopes; `gradient` overwrites
the student's rows with d loss / d logits, and the products of the head follow. Nothing waits for
the device: the host knows the routes.

A chunk launches three products, four with a teacher; `statistics` once for each of the two; and
`gradient` once a route. In bfloat16 the kernels read and write 6 bytes a logit, of a token with a
divergence 8, of its teacher 6, of a reweighted token's teacher 2.

Scores in the teacher's place (top_k.py) take no teacher's rows: `statistics` runs once more on the
routed rows, without the entries that the scores name, and `gradient` needs no divergence. A gate of
the divergence launches its two passes apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..schemas.labels import Route, Signal
from . import fused_kernels
from .fused_call import TRITON_BUFFER_BYTES, Call, chunk_sizes, wide
from .fused_kernels import TERMS, TYPES
from .fused_scored import ScoredRows
from .losses import LossOutput
from .policy_losses import policy_loss, reweighted_advantage

# Any: Triton's types know no launch options.
statistics: Any = fused_kernels.statistics
gradient: Any = fused_kernels.gradient

BUFFER_BYTES = TRITON_BUFFER_BYTES
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
        scores, reads = inputs.scores, call.reads
        hosts = call.routes(teacher_hidden is not None or scores is not None)
        taught = hosts != Route.GRPO
        doubled = np.zeros_like(taught) if scores is not None else taught
        stride = -(-vocab // _ALIGN) * _ALIGN
        stored = kind if config.fp32_logits else hidden.dtype
        most = max(2, BUFFER_BYTES // (stride * stored.itemsize))
        sizes = chunk_sizes(doubled, most)
        buffer = torch.empty(
            min(most, tokens + int(doubled.sum())), stride, dtype=stored, device=device
        )
        slopes = buffer.view(hidden.dtype)  # a row's slopes start where its logits do
        out = {name: torch.zeros(tokens, dtype=kind, device=device) for name in LossOutput._fields}
        lse, teacher_lse, teacher_entropy, taught_logprobs, lift, value = torch.zeros(
            6, tokens, dtype=kind, device=device
        )
        if Signal.TEACHER_ENTROPY in reads:
            teacher_entropy = out["teacher_entropy"]
        kl_lift, policy_weight, route, rows = value, inputs.weight, None, None
        if taught.any():
            route = inputs.route
            diverges = (route != Route.GRPO) & (route != Route.REWEIGHT)
            # Routed tokens return to GRPO as the KL fades; REWEIGHT's never leave it.
            policy_weight = torch.where(diverges, call.grpo_weight * inputs.weight, inputs.weight)
            kl_lift = torch.where(diverges, call.kl_weight * inputs.weight, 0.0)
            rows = torch.where(route != Route.GRPO, (route != Route.GRPO).cumsum(0) - 1, -1)
        # A gate of the divergence needs it before its slopes.
        apart = Signal.DIVERGENCE in reads and scores is None and bool(taught.any())
        pulls = torch.zeros_like(lse)
        heat = teacher_heat = inputs.temperature.to(kind).reciprocal()
        if call.teacher_temperature is not None:
            teacher_heat = torch.full_like(heat, 1 / call.teacher_temperature)
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
        forms = shape | {
            "CLIP": config.kl_clip.value, "BOUND": config.kl_clip_value, "BETA": config.jsd_beta,
            "NARROW": stored != hidden.dtype, "CAP": head.softcap,
            "TEACHER_CAP": teacher_head.softcap,
        }  # fmt: skip
        first = base = 0
        for size in sizes:
            at = slice(first, first + size)
            present = set(hosts[at].tolist())
            count = int(taught[at].sum())
            taught_rows = 0 if scores is not None else count
            logits, teacher = buffer[:size, :vocab], buffer[size : size + taught_rows, :vocab]
            gate = scored = None
            tensors = (
                logits, head.bias, slopes, teacher, teacher_head.bias, inputs.token_ids, heat,
                teacher_heat, rows, route, lse, teacher_lse, out["logprobs"], lift, kl_lift, value,
                out["kl"], out["kl_clipped"],
            )  # fmt: skip
            with _exact_sums():
                _product(logits, hidden[at], head.weight.T)
                if taught_rows:
                    assert teacher_hidden is not None
                    states = teacher_hidden[base : base + count]
                    _product(teacher, states, teacher_head.weight.T)
            statistics[(size,)](
                logits, head.bias, inputs.token_ids, heat, None, lse, out["entropy"],
                out["logprobs"], first, 0, CAP=head.softcap, HOLES=False, **shape,
            )  # fmt: skip
            advantage, logprobs = inputs.advantage[at], out["logprobs"][at]
            if count and scores is not None:
                scored = ScoredRows(call, logits, heat, lse, taught[at], first, base)
                with scored.without_support() as (own_rows, rest_lse, spare):
                    statistics[(size,)](
                        logits, head.bias, inputs.token_ids, heat, own_rows, rest_lse, *spare,
                        first, first, CAP=head.softcap, HOLES=True, **shape,
                    )  # fmt: skip
                scored.diverge(rest_lse, value, taught_logprobs, teacher_entropy, out)
            elif count:
                statistics[(size,)](
                    teacher, teacher_head.bias, inputs.token_ids, teacher_heat, rows, teacher_lse,
                    teacher_entropy, taught_logprobs, first, base, CAP=teacher_head.softcap,
                    HOLES=False, **shape,
                )  # fmt: skip
            if count:
                if apart:
                    for code in sorted(present & TERMS.keys()):
                        gradient[(size,)](
                            *tensors, pulls, first, base, code, STAGE="divergence",
                            TERM=TERMS[Route(code)], **forms,
                        )  # fmt: skip
                if config.entropy_beta:
                    kl_lift[at] *= torch.exp(-config.entropy_beta * teacher_entropy[at])
                signals = {
                    Signal.STUDENT_ENTROPY: out["entropy"][at], Signal.DIVERGENCE: out["kl"][at],
                    Signal.TEACHER_ENTROPY: teacher_entropy[at],
                }  # fmt: skip
                gate = call.gate(at, signals)
                if gate is not None:
                    out["gate"][at] = torch.where(inputs.route[at] != Route.GRPO, gate, 0.0)
                factor = call.kl_factor(at, gate, logprobs)
                if factor is not None:
                    kl_lift[at] *= factor
            if int(Route.REWEIGHT) in present:
                scaled = reweighted_advantage(
                    advantage, logprobs, taught_logprobs[at], call.kl_weight, config,
                    call.reweight_factor(at, gate), call.contrast(at),
                )  # fmt: skip
                advantage = torch.where(inputs.route[at] == Route.REWEIGHT, scaled, advantage)
            out["loss"][at], lift[at], out["ratio_clipped"][at], out["reference_kl"][at] = (
                policy_loss(
                    logprobs, advantage, policy_weight[at], inputs, at, config, call.ratio(at)
                )
            )
            if scored is not None:
                scored.pull(lift, kl_lift, pulls, out["logprobs"])
            for code in sorted(present):
                term = TERMS.get(Route(code)) if scores is None else None
                known = pulls if (apart and term) or (scored is not None and code) else None
                gradient[(size,)](
                    *tensors, known, first, base, code, TERM=term,
                    STAGE="slopes" if apart and term else "both", **forms,
                )  # fmt: skip
            if scored is not None:
                scored.write(slopes)
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
