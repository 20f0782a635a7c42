"""The routed objective and its gradients in one pass over the vocabulary, chunk by chunk.

From the student's hidden states, the head and the teacher's hidden states at routed tokens to the
loss: no (tokens, vocab) tensor exists, gradients are formed in the forward pass, nothing is
recomputed, and the teacher's head runs on routed tokens only.

A chunk's logits, the teacher's behind the student's, stand in one buffer and turn into the gradient
in place. Between the matrix products they are worked on in blocks of rows of one route, small enough
for the cache.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..schemas.configs import LossConfig
from ..schemas.labels import Route
from .losses import DIVERGENCES, divergence, policy_terms, reference_kl, reweighted_advantage

# Logits held at once, student's and teacher's together, and those worked on between the products,
# bytes. On CUDA the products need long chunks; on CPU a block has to stay in the cache.
BUFFER_BYTES = {"cpu": 120 << 20, "cuda": 1 << 30}
_BLOCK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 27}
# Vocabulary entries whose weight gradient is summed at once where it needs a wider type.
_VOCAB_SLICE = 8192
# Vocabulary entries of one product of logits on CPU: for few rows BLAS is slow on the whole head.
_CPU_SLICE = 1024


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap · tanh((h Wᵀ + b) / softcap).

    weight: (vocab, hidden); bias: (vocab,); softcap: None for plain logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class LossInputs:
    """Response tokens of one micro-batch, one sequence after another; all (tokens,).

    token_ids: int64. old_logprobs: float32, under the sampling policy at `temperature`.
    advantage: float32. weight: float32, global to the step (`losses.token_weights`). temperature:
    float32, divides the logits. route: uint8 of Route. reference_logprobs: float32 under the base
    policy; None without a KL to it.
    """

    token_ids: torch.Tensor
    old_logprobs: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    temperature: torch.Tensor
    route: torch.Tensor
    reference_logprobs: torch.Tensor | None = None


class LossOutput(NamedTuple):
    """loss: scalar with gradient. The rest is (tokens,) float32 without one.

    logprobs and entropy: the student's, nats. ratio_clipped, kl_clipped: 1 where a bound binds.
    kl: the exact divergence of routed tokens, nats, 0 elsewhere. reference_kl: nats.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    ratio_clipped: torch.Tensor
    kl: torch.Tensor
    kl_clipped: torch.Tensor
    reference_kl: torch.Tensor


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
    grpo_weight: 1 − λ_k / w0, GRPO's on routed tokens. teacher_hidden: (routed, hidden) in the order
    of the tokens whose route is not GRPO; None when λ is 0 or nothing is routed. Sums are in float32
    at least, whatever the inputs are.
    """
    heated = bool((inputs.temperature != 1).any())
    call = _Call(inputs, config, kl_weight, grpo_weight, head, teacher_head, heated)
    outputs = _FusedRoutedLoss.apply(hidden, head.weight, head.bias, teacher_hidden, call)
    return LossOutput(*outputs)  # pyright: ignore


@torch.no_grad()
def token_logprobs(
    hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of tokens, (tokens,) float32, without ever holding all their logits."""
    head = _cast(head, hidden.dtype)
    rows = _rows(hidden, head, BUFFER_BYTES)
    out = []
    for states, ids, heat in zip(
        hidden.split(rows), token_ids.split(rows), temperature.split(rows), strict=True
    ):
        logits = torch.empty(
            len(states), len(head.weight), dtype=_wide(hidden), device=hidden.device
        )
        _project(states, head, logits)
        log_p = torch.log_softmax(_shape(logits, head, heat[:, None]), -1)
        out.append(log_p.gather(1, ids[:, None]).squeeze(1))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=_wide(hidden))


@dataclass(frozen=True)
class _Call:
    """What the autograd function takes besides differentiable tensors."""

    inputs: LossInputs
    config: LossConfig
    kl_weight: float
    grpo_weight: float
    head: Head
    teacher_head: Head | None
    heated: bool  # some temperature is not 1


class _FusedRoutedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, teacher_hidden: Any, call: _Call):
        wide = _wide(hidden)
        # Cast once for all chunks where the head is kept in a wider type than it computes in.
        head, teacher_head = (_cast(h, hidden.dtype) for h in (call.head, call.teacher_head))
        statistics = {
            name: torch.zeros(len(hidden), dtype=wide, device=hidden.device)
            for name in ("loss", "logprobs", "entropy", "ratio_clipped", "kl", "kl_clipped", "reference_kl")
        }  # fmt: skip
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Written by the first chunk: filling it with zeros would be a pass over the whole head.
        grad_weight = torch.empty_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        rows = min(_rows(hidden, call.head, BUFFER_BYTES), max(len(hidden), 2))
        step = min(_rows(hidden, call.head, _BLOCK_BYTES), rows)
        # The block's log-probabilities: allocated anew they would be paged in anew each time.
        scratch = torch.empty(2, step, len(weight), dtype=wide, device=hidden.device)
        buffer = torch.empty(rows, len(weight), dtype=wide, device=hidden.device)
        written = False
        for positions, taught, parts in _chunks(call, teacher_hidden is not None, rows):
            states = hidden[positions]  # (chunk, hidden)
            logits = buffer[: len(states)]  # (chunk, vocab)
            _project(states, head, logits)
            if len(taught):
                assert teacher_head is not None, "a teacher's states need its head"
                teacher_logits = buffer[len(states) : len(states) + len(taught)]
                _project(teacher_hidden[taught], teacher_head, teacher_logits)
            for route, first, last in parts:
                for start in range(first, last, step):
                    block = slice(start, min(start + step, last))
                    _logits_to_gradient(
                        logits[block],
                        teacher_logits[block] if route != Route.GRPO else None,
                        Route(route),
                        positions[block],
                        call,
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
        scale, (grad_hidden, grad_weight, grad_bias) = grad_outputs[0], ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        unscaled = scale.device.type == "cpu" and scale.item() == 1  # on CUDA asking would wait

        def scaled(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if gradient is None:
                return None
            # In place: this function owns them, and the weight's is as large as the head.
            return (gradient if unscaled else gradient.mul_(scale)).to(dtype)

        return (
            scaled(grad_hidden, hidden_dtype),
            scaled(grad_weight, weight_dtype),
            scaled(grad_bias, bias_dtype),
            None,
            None,
        )


def _chunks(call: _Call, with_teacher: bool, rows: int):
    """(token positions, rows of teacher_hidden, parts) of each chunk of at most `rows` logits.

    Positions are sorted by route, routed ones first, so that a chunk's i-th teacher row is that of
    its i-th token. parts: (route, first, last) of each route's tokens; all GRPO without a teacher.
    """
    device, kinds = call.inputs.route.device, call.inputs.route.cpu()
    if not with_teacher or call.kl_weight == 0:
        kinds = torch.zeros_like(kinds)
    routed = kinds != 0
    costs = torch.cumsum(1 + routed.long(), 0)  # rows of logits, the teacher's among them
    teacher_rows = torch.cumsum(routed.long(), 0) - 1
    total = int(costs[-1]) if len(costs) else 0
    # Even chunks: a short last one would be as slow as it is small. A token of two rows may lie
    # across a border, hence rows − 1.
    count = -(-total // (rows - 1))
    chunk_of = (costs - 1) * count // max(total, 1)
    for positions in torch.arange(len(kinds)).split(chunk_of.bincount(minlength=count).tolist()):
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
    call: _Call,
    statistics: dict[str, torch.Tensor],
    scratch: torch.Tensor,
) -> None:
    """Turn a block's logits (rows, vocab) into d loss / d logits in place; fill in its statistics.

    scratch: (2, rows or more, vocab), overwritten.
    """
    inputs, config = call.inputs, call.config
    ids = inputs.token_ids[positions, None]
    temperature = inputs.temperature[positions, None] if call.heated else None  # (rows, 1)
    slope = _softcap_slope(logits, call.head)
    logits = _shape(logits, call.head, temperature)
    p, log_q = scratch[:, : len(logits)]  # (rows, vocab) each
    torch.softmax(logits, -1, out=p)
    # log p = z − z_max + log p_max, and only where it is needed: one exponential per entry is enough.
    most, log_most = logits.amax(-1), p.amax(-1).log()  # (rows,) each
    logprobs = logits.gather(1, ids).squeeze(1) - most + log_most
    # The products into a buffer that is there: vecdot would take a fresh one.
    entropy = most - log_most - torch.mul(p, logits, out=log_q).sum(-1)
    weight, advantage = inputs.weight[positions], inputs.advantage[positions]
    # As the KL fades routed tokens return to GRPO; reweighted ones never left it.
    policy_weight = weight * (call.grpo_weight if route in DIVERGENCES else 1.0)
    kl_slope, kl_loss, kl_weight = None, 0.0, call.kl_weight * weight
    if teacher_logits is not None:
        assert call.teacher_head is not None
        torch.log_softmax(_shape(teacher_logits, call.teacher_head, temperature), -1, out=log_q)
        if route not in DIVERGENCES:  # REWEIGHT
            advantage = reweighted_advantage(
                advantage, logprobs, log_q.gather(1, ids).squeeze(1), call.kl_weight, config.reweight_clip
            )  # fmt: skip
        else:
            log_p = logits.sub_(most[:, None]).add_(log_most[:, None])
            q = torch.exp(log_q, out=teacher_logits)
            if config.entropy_beta:
                kl_weight = kl_weight * torch.exp(
                    config.entropy_beta * torch.linalg.vecdot(q, log_q)
                )
            value, exact, clipped, kl_slope = divergence(route, p, log_p, q, log_q, config)
            kl_loss = kl_weight * value
            statistics["kl"][positions] = exact
            statistics["kl_clipped"][positions] = clipped.to(exact.dtype)
    with torch.enable_grad():
        variable = logprobs.detach().requires_grad_()
        terms, bound = policy_terms(variable, inputs.old_logprobs[positions], advantage, config)
        losses = (policy_weight if config.grpo else 0.0) * terms
        if inputs.reference_logprobs is not None:
            kl = reference_kl(variable, inputs.reference_logprobs[positions])
            losses = losses + config.reference_kl * weight * kl
            statistics["reference_kl"][positions] = kl.detach()
        (slope_logprob,) = torch.autograd.grad(losses.sum(), variable)  # (rows,)
    statistics["loss"][positions] = losses.detach() + kl_loss
    statistics["logprobs"][positions] = logprobs
    statistics["entropy"][positions] = entropy
    statistics["ratio_clipped"][positions] = bound.to(logprobs.dtype)
    # d log p(y) / d logits = onehot(y) − p; the KL's is λ (s − p Σ s), see losses.divergence.
    lift = _per_logit(slope_logprob[:, None], temperature)  # (rows, 1)
    kl_lift = _per_logit(kl_weight[:, None], temperature)
    pull = lift if kl_slope is None else lift + kl_lift * kl_slope.sum(-1, keepdim=True)
    gradient = torch.mul(p, -pull, out=logits).scatter_add_(1, ids, lift)
    if kl_slope is not None:
        gradient.addcmul_(kl_slope, kl_lift)
    if slope is not None:
        gradient *= slope


def _shape(logits: torch.Tensor, head: Head, temperature: torch.Tensor | None) -> torch.Tensor:
    """Soft cap and temperature (rows, 1), in place: (rows, vocab)."""
    if head.softcap:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits if temperature is None else logits.div_(temperature)


def _per_logit(slope: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    """A slope in logits over temperature, (rows, 1), as one in logits."""
    return slope if temperature is None else slope / temperature


def _softcap_slope(logits: torch.Tensor, head: Head) -> torch.Tensor | None:
    """d capped logits / d raw logits, (rows, vocab); None without a cap."""
    return 1 - (logits / head.softcap).tanh_().square_() if head.softcap else None


def _cast(head: Head | None, dtype: torch.dtype) -> Any:
    return None if head is None else replace(head, weight=head.weight.to(dtype))


def _project(states: torch.Tensor, head: Head, out: torch.Tensor) -> None:
    """Raw logits (rows, vocab) of states (rows, hidden) into `out`."""
    if out.dtype == states.dtype:
        step = _CPU_SLICE if out.device.type == "cpu" else len(head.weight)
        for start in range(0, len(head.weight), step):
            part = slice(start, start + step)
            torch.mm(states, head.weight[part].T, out=out[:, part])
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


def _rows(hidden: torch.Tensor, head: Head, budget: dict[str, int]) -> int:
    """Rows of logits within a device's budget of bytes."""
    row_bytes = len(head.weight) * torch.finfo(_wide(hidden)).bits // 8
    return max(2, budget.get(hidden.device.type, budget["cuda"]) // row_bytes)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """float32 at least: bfloat16 would round probabilities to three digits."""
    return torch.promote_types(tensor.dtype, torch.float32)
