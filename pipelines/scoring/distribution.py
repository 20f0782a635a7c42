"""A teacher's distribution at some tokens: its likeliest entries, the rest's mass, and entropies.

local.py calls `scored` with hidden states. The vocabulary's softmax is computed in float32, chunk
by chunk, so memory does not grow with the number of tokens.
"""

from dataclasses import replace

import numpy as np
import torch

from ...trace.fused_call import floored, wide
from ...trace.fused_torch import BUFFER_BYTES, buffer_rows, project
from ...trace.losses import Head
from ...trace.scores import NOTHING
from .engine import Scored


def scored(
    states: torch.Tensor,
    head: Head,
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    k: int,
    size: int,
    student: tuple[torch.Tensor, Head, torch.Tensor] | None = None,
) -> Scored:
    """The teacher at some tokens.

    states: (tokens, hidden); token_ids: (tokens,) int64, the response's; temperature: (tokens,)
    float32, divides the logits; k: likeliest entries to keep, at most size; size: ids of the shared
    vocabulary, entries beyond it have no probability. student: its own states, head and
    temperature, for entropy and KL(student‖teacher); None: neither.
    """
    heads = [_cut(head, size, states.dtype)]
    if student is not None:
        heads.append(_cut(student[1], size, student[0].dtype))
    rows = buffer_rows(states, heads[0], BUFFER_BYTES)
    parts = [
        _chunk(states[chunk], heads, token_ids[chunk], temperature[chunk], k,
               None if student is None else (student[0][chunk], student[2][chunk]))
        for first in range(0, len(states), rows)
        for chunk in [slice(first, first + rows)]
    ]  # fmt: skip
    if not parts:
        nothing = np.zeros(0, np.float32)
        extra = None if student is None else nothing
        ids, top = np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        return Scored(ids, top, nothing, nothing, nothing, extra, extra)
    columns = zip(*(part.arrays() for part in parts), strict=True)
    return Scored(*(None if c[0] is None else np.concatenate(c) for c in columns))  # pyright: ignore


def _chunk(
    states: torch.Tensor,
    heads: list[Head],
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    k: int,
    student: tuple[torch.Tensor, torch.Tensor] | None,
) -> Scored:
    log_q = _log_softmax(states, heads[0], temperature)  # (rows, size)
    logprobs = log_q.gather(1, token_ids[:, None]).squeeze(1)
    top, ids = log_q.topk(k, -1)  # (rows, k), likeliest first
    entropy = _entropy(log_q)
    student_entropy = divergence = None
    if student is not None:
        log_p = _log_softmax(student[0], heads[1], student[1])
        student_entropy = _entropy(log_p)
        gap = floored(log_p) - floored(log_q)
        divergence = (log_p.exp() * gap).sum(-1).clamp(min=0)
    # Last, because it overwrites: the mass of all other entries, summed as logarithms, since
    # 1 − Σ top would lose all digits of a small one.
    tail = log_q.scatter_(1, ids, -torch.inf).logsumexp(-1)
    return Scored(
        ids.cpu().numpy().astype(np.int32),
        _numbers(top),
        _numbers(tail),
        _numbers(logprobs),
        _numbers(entropy),
        None if student_entropy is None else _numbers(student_entropy),
        None if divergence is None else _numbers(divergence),
    )


def _log_softmax(states: torch.Tensor, head: Head, temperature: torch.Tensor) -> torch.Tensor:
    """(rows, size) float32 or wider."""
    logits = torch.empty(len(states), len(head.weight), dtype=wide(states), device=states.device)
    project(states, head, logits, fp32=False)
    return torch.log_softmax(head.shape_(logits, temperature[:, None]), -1)


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    """(rows,), nats; 0 · −∞ is 0."""
    return -(log_p.exp() * log_p).nansum(-1)


def _cut(head: Head, size: int, dtype: torch.dtype) -> Head:
    """The head without the rows of ids that the shared vocabulary lacks."""
    bias = None if head.bias is None else head.bias[:size]
    return replace(head.cast(dtype), weight=head.weight[:size].to(dtype), bias=bias)


def _numbers(values: torch.Tensor) -> np.ndarray:
    """float32 in the host's memory, with NOTHING for −∞."""
    return values.clamp(min=NOTHING).float().cpu().numpy()
