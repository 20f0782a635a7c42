"""The routed loss and its gradients in PyTorch's own operations: on CPU, and as the reference.

One buffer holds a chunk's logits, the teacher's after the student's, and the gradient overwrites
them. Between the matrix products they are processed in blocks of rows of one route that fit the
cache. To add a divergence, see `losses.DIVERGENCES`: nothing here names one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..schemas.configs import LossConfig
from ..schemas.labels import Route
from .losses import (
    DIVERGENCES,
    FLOOR,
    Head,
    LossInputs,
    LossOutput,
    divergence,
)
from .policy_losses import policy_loss, reweighted_advantage

# Bytes of a chunk's logits, student's and teacher's together, and of a block between the products.
# On CUDA the products need long chunks; on CPU a block has to fit the cache.
BUFFER_BYTES = {"cpu": 120 << 20, "cuda": 1 << 30}
BLOCK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 27}
# Vocabulary entries per step where the weight gradient is summed in a wider type.
_VOCAB_SLICE = 8192
# Vocabulary entries per product of logits on CPU: with few rows BLAS is slow on the full head.
_CPU_SLICE = 1024


@dataclass(frozen=True)
class Call:
    """Arguments of the autograd functions that are not differentiable tensors."""

    inputs: LossInputs
    config: LossConfig
    kl_weight: float
    grpo_weight: float
    head: Head
    teacher_head: Head | None

    def routes(self, with_teacher: bool) -> np.ndarray:
        """Each token's route in the host's memory; GRPO's where no teacher teaches."""
        route = self.inputs.host_route
        if not with_teacher or self.kl_weight == 0:
            return np.zeros(len(self.inputs.route), np.uint8)
        return self.inputs.route.cpu().numpy() if route is None else route


def chunk_sizes(routed: np.ndarray, rows: int) -> list[int]:
    """Tokens of each chunk of at most `rows` rows of logits; a routed token has two.

    routed: (tokens,) bool. Chunks are even, because a short last one is inefficient.
    """
    costs = np.cumsum(1 + routed.astype(np.int64))
    if not len(costs):
        return []
    count = -(-costs[-1] // (rows - 1))  # a routed token may cross a border, hence rows − 1
    return np.bincount((costs - 1) * count // costs[-1], minlength=count).tolist()


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
        for positions, taught, parts in _chunks(call, teacher_hidden is not None, rows):
            states = hidden[positions]  # (chunk, hidden)
            logits = buffer[: len(states)]  # (chunk, vocab)
            project(states, head, logits, fp32)
            if len(taught):
                assert teacher_head is not None, "a teacher's states need its head"
                teacher_logits = buffer[len(states) : len(states) + len(taught)]
                project(teacher_hidden[taught], teacher_head, teacher_logits, fp32)
            for route, first, last in parts:
                for start in range(first, last, step):
                    block = slice(start, min(start + step, last))
                    _logits_to_gradient(
                        logits[block],
                        teacher_logits[block] if route != Route.GRPO else None,
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


def _chunks(call: Call, with_teacher: bool, rows: int):
    """(token positions, rows of teacher_hidden, parts) of each chunk of at most `rows` logits.

    Positions are sorted by route, routed ones first, so that a chunk's i-th teacher row belongs to
    its i-th token. parts: (route, first, last) of each route's tokens; all GRPO without a teacher.
    """
    device = call.inputs.route.device
    kinds = torch.from_numpy(call.routes(with_teacher))
    routed = kinds != 0
    teacher_rows = torch.cumsum(routed.long(), 0) - 1
    for positions in torch.arange(len(kinds)).split(chunk_sizes(routed.numpy(), rows)):
        positions = positions[kinds[positions].argsort(descending=True, stable=True)]
        taught = teacher_rows[positions[routed[positions]]]
        values, sizes = torch.unique_consecutive(kinds[positions], return_counts=True)
        lasts = sizes.cumsum(0)
        parts = zip(values.tolist(), (lasts - sizes).tolist(), lasts.tolist(), strict=True)
        yield positions.to(device), taught.to(device), list(parts)


def _logits_to_gradient(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    route: Route,
    positions: torch.Tensor,
    call: Call,
    heated: bool,
    statistics: dict[str, torch.Tensor],
    scratch: torch.Tensor,
) -> None:
    """Turn a block's logits (rows, vocab) into d loss / d logits in place, and fill its statistics.

    scratch: (2, rows or more, vocab), overwritten.
    """
    inputs, config = call.inputs, call.config
    ids = inputs.token_ids[positions, None]
    temperature = inputs.temperature[positions, None] if heated else None  # (rows, 1)
    slope = call.head.slope(logits)
    logits = call.head.shape_(logits, temperature)
    p, log_q = scratch[:, : len(logits)]  # (rows, vocab) each
    torch.softmax(logits, -1, out=p)
    # log p = z − z_max + log p_max, only where needed: one exponential per entry is enough.
    most, log_most = logits.amax(-1), p.amax(-1).log()  # (rows,) each
    logprobs = logits.gather(1, ids).squeeze(1) - most + log_most
    # The products go into an existing buffer; vecdot would allocate one.
    products = torch.mul(p, logits, out=log_q)
    entropy = most - log_most - products.sum(-1)
    # 0 · −∞ is NaN, and counts as 0. On CUDA to ask would wait for the device.
    masked = logits.is_cuda or bool(entropy.isnan().any())
    if masked:
        entropy, logprobs = most - log_most - products.nansum(-1), floored(logprobs)
    weight, advantage = inputs.weight[positions], inputs.advantage[positions]
    # Routed tokens return to GRPO as the KL fades; REWEIGHT's never leave it.
    policy_weight = weight * (call.grpo_weight if route in DIVERGENCES else 1.0)
    kl_slope, kl_loss, kl_weight = None, 0.0, call.kl_weight * weight
    if teacher_logits is not None:
        assert call.teacher_head is not None
        torch.log_softmax(call.teacher_head.shape_(teacher_logits, temperature), -1, out=log_q)
        if route not in DIVERGENCES:  # REWEIGHT
            taught = floored(log_q.gather(1, ids).squeeze(1))
            advantage = reweighted_advantage(advantage, logprobs, taught, call.kl_weight, config)
        else:
            log_p = logits.sub_(most[:, None]).add_(log_most[:, None])
            q = torch.exp(log_q, out=teacher_logits)
            if masked:
                floored(log_p, out=log_p)
            if log_q.is_cuda or log_q.amin() == -torch.inf:
                floored(log_q, out=log_q)
            if config.entropy_beta:
                kl_weight = kl_weight * torch.exp(
                    config.entropy_beta * torch.linalg.vecdot(q, log_q)
                )
            value, exact, clipped, kl_slope = divergence(route, p, log_p, q, log_q, config)
            kl_loss = kl_weight * value
            if masked:  # the floor is a constant
                kl_slope.masked_fill_(log_p == FLOOR, 0.0)
            statistics["kl"][positions] = exact
            statistics["kl_clipped"][positions] = clipped.to(exact.dtype)
    loss, lift, bound, base_kl = policy_loss(
        logprobs, advantage, policy_weight, inputs, positions, config
    )
    if masked:
        lift = lift.masked_fill(logprobs == FLOOR, 0.0)
    statistics["loss"][positions] = loss + kl_loss
    statistics["logprobs"][positions] = logprobs
    statistics["entropy"][positions] = entropy
    statistics["ratio_clipped"][positions] = bound.to(logprobs.dtype)
    statistics["reference_kl"][positions] = base_kl
    # d log p(y) / d logits = onehot(y) − p; the KL's is λ (s − p Σ s), see losses.DIVERGENCES.
    lift, kl_lift = lift[:, None], kl_weight[:, None]  # (rows, 1), slopes in logits / temperature
    if temperature is not None:
        lift, kl_lift = lift / temperature, kl_lift / temperature
    pull = lift if kl_slope is None else lift + kl_lift * kl_slope.sum(-1, keepdim=True)
    gradient = torch.mul(p, -pull, out=logits).scatter_add_(1, ids, lift)
    if kl_slope is not None:
        gradient.addcmul_(kl_slope, kl_lift)
    if slope is not None:
        gradient *= slope


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


def floored(logprobs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities with FLOOR instead of −∞."""
    return torch.nan_to_num(logprobs, nan=torch.nan, posinf=torch.inf, neginf=FLOOR, out=out)


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


def wide(tensor: torch.Tensor) -> torch.dtype:
    """float32 at least: bfloat16 would round probabilities to three digits."""
    return torch.promote_types(tensor.dtype, torch.float32)
