"""Implementations of one loss on one case, measured by loss.py.

Every implementation takes a `Case`, leaves the gradients of its student's hidden states and head on
it and returns the loss. All but two compute the same

    L = Σ_t w [ c_t g_t + λ 1(t ∈ S) KL(q_t‖p_t) ],   w = 1 / tokens,   c_t = 1 − λ/w0 on S, else 1

(METHOD.md, "Objective", with the FKL action, no clip and responses of one length):

- floor: no loss, only the matrix products that every implementation needs: the student's logits,
  both of their gradients, the teacher's logits at routed tokens.
- naive: plain PyTorch with full logits; autograd runs the backward pass.
- trl_span: TRL 1.16's `ChunkedLogProbFunction`, called as in its GRPOTrainer's fused head
  (`trainer.utils.add_fused_lm_head`), and its DistillationTrainer's `_chunked_divergence_loss` on
  the routed tokens, gathered beforehand.
- trl_all: the same with the divergence on every token, as TRL's trainers compute it: S is all
  tokens in the KL's term.
- liger: Liger 0.8.5's `LigerFusedLinearGRPOLoss` and `LigerFusedLinearJSDLoss` (β = 0) on the
  routed tokens. The weights are the GRPO's mask and the JSD's soft weight, so no scaling follows.
  Not compiled on CPU: compilation takes longer than the measurement and changes little.
- ours: `trace_opd.trace.fused.routed_loss`. `ours:backend=torch` is ours with an override of
  LossConfig.

verl and prime-rl have no row. verl 0.9.1 asks for transformers below 5.11 and its divergence reads
the teacher's most likely tokens alone; prime-rl is on no package index.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from loss_case import CLIP_HIGH, CLIP_LOW, GRPO_WEIGHT, KL_WEIGHT, Case
from torch.nn import functional

from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip
from trace_opd.schemas.settings import override
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs

# Rows per product of the floor: one product as long as that is fastest.
FLOOR_ROWS = 2048
CONFIG = LossConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl_clip=KlClip.NONE)


@cache
def _buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


@torch.no_grad()
def floor(case: Case) -> torch.Tensor:
    tokens, vocab = len(case.hidden), len(case.head)
    kind = (case.hidden.dtype, case.hidden.device)
    logits = _buffer(min(tokens, FLOOR_ROWS), vocab, *kind)
    grad_hidden, grad_head = torch.empty_like(case.hidden), torch.empty_like(case.head)
    for taught in case.routed_teacher.split(len(logits)):
        torch.mm(taught, case.teacher_head.T, out=logits[: len(taught)])
    for start in range(0, tokens, len(logits)):
        rows = slice(start, start + len(logits))
        torch.mm(case.hidden[rows], case.head.T, out=logits)
        torch.mm(logits, case.head, out=grad_hidden[rows])
        if start:
            grad_head.addmm_(logits.T, case.hidden[rows])
        else:
            torch.mm(logits.T, case.hidden[rows], out=grad_head)
    case.hidden.grad, case.head.grad = grad_hidden, grad_head
    return torch.zeros(())


def surrogate(case: Case, logprobs: torch.Tensor) -> torch.Tensor:
    """Σ_t w c_t g_t from the student's log-probabilities (T,), in the form of TRL's GRPOTrainer."""
    ratio, advantage = torch.exp(logprobs - case.old_logprobs), case.token_advantage
    clipped = torch.clamp(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -(case.weight * torch.min(ratio * advantage, clipped * advantage)).sum()


def naive(case: Case) -> torch.Tensor:
    log_p = functional.log_softmax((case.hidden @ case.head.T).float(), -1)  # (T, V)
    with torch.no_grad():
        log_q = functional.log_softmax((case.routed_teacher @ case.teacher_head.T).float(), -1)
    logprobs = log_p.gather(1, case.token_ids[:, None]).squeeze(1)
    kl = (log_q.exp() * (log_q - log_p[case.routed_rows])).sum()
    loss = surrogate(case, logprobs) + KL_WEIGHT / len(case.hidden) * kl
    loss.backward()
    return loss


def _trl(case: Case, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logprobs, *_ = ChunkedLogProbFunction.apply(
        case.hidden, case.head, None, case.token_ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
        ("log_probs", "entropy"),
    )  # fmt: skip
    mask = torch.ones(1, len(student), dtype=torch.long, device=student.device)
    divergence, _, _ = _chunked_divergence_loss(
        student[None], teacher[None], case.head, case.teacher_head, mask, beta=0.0,
        num_items_in_batch=len(case.hidden),
    )  # fmt: skip
    loss = surrogate(case, logprobs) + KL_WEIGHT * divergence
    loss.backward()
    return loss


def trl_span(case: Case) -> torch.Tensor:
    return _trl(case, case.hidden[case.routed_rows], case.routed_teacher)


def trl_all(case: Case) -> torch.Tensor:
    return _trl(case, case.hidden, case.teacher_hidden)


def liger(case: Case) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss

    compiled = case.hidden.is_cuda
    shape = (len(case.advantage), -1)
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH,
        loss_type="dapo", compiled=compiled,
    )  # fmt: skip
    policy, _ = grpo(
        case.hidden.view(*shape, case.hidden.shape[1]), case.head, case.token_ids.view(shape),
        case.weight.view(shape), case.advantage, old_per_token_logps=case.old_logprobs.view(shape),
        num_items_in_batch=1.0,
    )  # fmt: skip
    routed = len(case.routed_rows)
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=KL_WEIGHT * routed / len(case.hidden), beta=0.0,
        compiled=compiled,
    )  # fmt: skip
    labels = case.token_ids[case.routed_rows]
    student = case.hidden[case.routed_rows]
    loss = policy + jsd(student, case.head, case.routed_teacher, case.teacher_head, labels)
    loss.backward()
    return loss


def ours(case: Case, config: LossConfig) -> torch.Tensor:
    inputs = LossInputs(
        token_ids=case.token_ids,
        old_logprobs=case.old_logprobs,
        advantage=case.token_advantage,
        weight=torch.full_like(case.weight, 1 / len(case.hidden)),
        temperature=torch.ones_like(case.weight),
        route=case.route,
        host_route=case.host_route,
        heated=False,
    )
    loss = routed_loss(
        case.hidden, Head(case.head), inputs, config, KL_WEIGHT, GRPO_WEIGHT,
        case.routed_teacher, Head(case.teacher_head),
    ).loss  # fmt: skip
    loss.backward()
    return loss


IMPLEMENTATIONS: dict[str, Callable[[Case], torch.Tensor]] = {
    "floor": floor,
    "ours": partial(ours, config=CONFIG),
    "naive": naive,
    "trl_span": trl_span,
    "trl_all": trl_all,
    "liger": liger,
}
PACKAGES = {"trl_span": "trl", "trl_all": "trl", "liger": "liger_kernel"}


def implementation(name: str) -> Callable[[Case], torch.Tensor]:
    """One of IMPLEMENTATIONS, or ours with overrides: `ours:backend=torch,fp32_logits=true`.

    Raises:
        ImportError: its package is not installed.
        InputError: LossConfig has no such field.
    """
    base, _, overrides = name.partition(":")
    if base == "ours" and overrides:
        return partial(ours, config=override(CONFIG, overrides.split(",")))
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise ImportError(f"{PACKAGES[name]} is not installed: pip install -e '.[peers]'")
    return IMPLEMENTATIONS[name]
