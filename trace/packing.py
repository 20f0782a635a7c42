"""Packing: sequences in one row without padding, a prompt once for all responses that share it.

sequences.py builds the rows, trainer.py passes them to a PackedModel. A row is a list of blocks: a
prompt's tokens, then each response's. Operations on single tokens (embedding, projections, MLP,
norms) see each token once. Attention loops over sequences: a response attends to its prompt and to
itself, as if the two were alone, through PyTorch's scaled_dot_product_attention with its causal
kernel. Positions restart with each prompt and continue from it in each response.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .losses import Head
from .policy import backbone, output_head
from .rope import Regime, frequencies_by_block, length_ropes, regime

ATTENTION = "trace_packed"
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """A row's blocks: their lengths, and (prompt's block, response's block) of each sequence."""

    lengths: tuple[int, ...]
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRow:
    """input_ids, position_ids: (1, tokens) int64.

    logit_positions: (kept tokens,) int64, positions of the hidden states that predict the kept
    response tokens, one sequence after another; kept: their number in each sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    logit_positions: torch.Tensor
    kept: tuple[int, ...]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for what a GPU has still to do.

    A copy from memory that is not pinned begins once all work before it is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[np.ndarray],
    keep: Sequence[np.ndarray] | None = None,
) -> PackedRow:
    """Pack sequences; consecutive equal prompts are stored once.

    keep: per sequence the response positions whose predicting states are kept, ascending; None:
    all of them.
    """
    blocks: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    sequences: list[tuple[int, int]] = []
    wanted: list[np.ndarray] = []
    at, prompt_end, prompt_block, before = 0, 0, 0, None
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if prompt != before:
            prompt_block, before = len(blocks), prompt
            blocks.append(np.asarray(prompt, dtype=np.int64))
            positions.append(np.arange(len(prompt)))
            at = prompt_end = at + len(prompt)
        sequences.append((prompt_block, len(blocks)))
        blocks.append(np.asarray(response, dtype=np.int64))
        positions.append(np.arange(len(prompt), len(prompt) + len(response)))
        kept = np.arange(len(response)) if keep is None else keep[index]
        # A state predicts the next token; the prompt's last predicts a response's first.
        wanted.append(np.where(kept == 0, prompt_end - 1, at + kept - 1))
        at += len(response)
    return PackedRow(
        torch.from_numpy(np.concatenate(blocks))[None],
        torch.from_numpy(np.concatenate(positions))[None],
        Layout(tuple(map(len, blocks)), tuple(sequences)),
        torch.from_numpy(np.concatenate(wanted)),
        tuple(map(len, wanted)),
    )


def split_prompts(
    row: PackedRow, regime: Callable[[int], Regime]
) -> tuple[PackedRow, list[Regime]]:
    """The row with shared prompts repeated where the lengths of their sequences differ in regime.

    regime: of a sequence's length. Also returns the regime of each block.
    """
    lengths = row.layout.lengths
    blocks: list[int] = []  # of the given row, in the order of the new one
    regimes: list[Regime] = []
    prompts: dict[tuple[int, Regime], int] = {}
    sequences: list[tuple[int, int]] = []
    for prompt, response in row.layout.sequences:
        own = regime(lengths[prompt] + lengths[response])
        if (prompt, own) not in prompts:
            prompts[prompt, own] = len(blocks)
            blocks.append(prompt)
            regimes.append(own)
        sequences.append((prompts[prompt, own], len(blocks)))
        blocks.append(response)
        regimes.append(own)
    if len(blocks) == len(lengths):
        return row, regimes
    ids, positions = (
        torch.cat([x.split(lengths, dim=1)[block] for block in blocks], dim=1)
        for x in (row.input_ids, row.position_ids)
    )
    old = np.cumsum([0, *lengths])
    new = np.cumsum([0, *(lengths[block] for block in blocks)])
    wanted = []
    for (prompt, response), at in zip(sequences, row.logit_positions.split(row.kept), strict=True):
        last = old[blocks[prompt] + 1] - 1  # predicts the response's first token
        moved = at + (new[response] - old[blocks[response]])
        wanted.append(torch.where(at == last, new[prompt + 1] - 1, moved))
    layout = Layout(tuple(lengths[block] for block in blocks), tuple(sequences))
    return PackedRow(ids, positions, layout, torch.cat(wanted), row.kept), regimes


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row; without `packed` (sampling) transformers' own SDPA attention.

    query: (1, heads, tokens, head); key, value: (1, key heads, tokens, head). attention_mask: of
    `_mask`. Returns (1, tokens, heads, head).
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # Split, not sliced: a slice's gradient is as large as the row.
    queries, keys, values = (x.split(packed.lengths, dim=2) for x in (query, key, value))
    window = _window(attention_mask)
    out, read = [], set()
    for prompt, response in packed.sequences:
        q, k, v = (
            torch.cat((blocks[prompt], blocks[response]), dim=2)
            for blocks in (queries, keys, values)
        )  # (1, heads, prompt + response, head)
        mask = _window_mask(q.shape[2], window, q.device)
        # The prompt's queries are recomputed with each response, which is cheaper than a mask.
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out.append(attended[:, :, packed.lengths[prompt] :] if prompt in read else attended)
        read.add(prompt)
    # Contiguous as transformers' own: some models view the result in another shape.
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool mask of causal attention within a window; None: no mask needed."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < window)


_PACKED: ContextVar[bool] = ContextVar("packed", default=False)


def _mask(
    *, local_size: int | None = None, device: torch.device | str = "cpu", **kwargs: Any
) -> torch.Tensor | None:
    """The mask that a model asks transformers for: of a packed row the window alone.

    Returns (1, 1, 1, 1): int64 on the CPU, the number of tokens in the window; bool, no window. The
    window comes from the mask, because not every architecture passes it to its attention as well.
    Chunks, which are no windows, `check_architecture` refuses.
    """
    if not _PACKED.get():
        return sdpa_mask(local_size=local_size, device=device, **kwargs)
    if local_size is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return torch.full((1, 1, 1, 1), local_size)


def _window(mask: torch.Tensor | None) -> int | None:
    return int(mask) if mask is not None and mask.dtype == torch.int64 else None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask)


class PackedModel(torch.nn.Module):
    """A causal language model that reads packed rows.

    One forward pass covers the backbone and the use of its states and head, so that FSDP keeps the
    head's weights gathered while they are used.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # In a list, because the backbone is already in the module tree as a part of the model.
        self._backbone = [backbone(model)]
        model.set_attn_implementation(ATTENTION)

    def forward(self, row: PackedRow, use: Callable[[torch.Tensor, Head], T]) -> T:
        """Call `use` with the states that predict the kept tokens, (kept, hidden), and the head."""
        (decoder,) = self._backbone
        device = next(decoder.parameters()).device
        frequencies: Any = nullcontext()
        if ropes := length_ropes(decoder):
            row, regimes = split_prompts(row, partial(regime, ropes))
            frequencies = frequencies_by_block(ropes, row.layout.lengths, regimes)
        packed = _PACKED.set(True)
        try:
            with frequencies:
                states = decoder(
                    input_ids=to_device(row.input_ids, device),
                    position_ids=to_device(row.position_ids, device),
                    # Two-dimensional, or transformers would derive sequences from the positions.
                    attention_mask=torch.ones_like(row.input_ids, dtype=torch.bool, device=device),
                    packed=row.layout,
                    use_cache=False,
                ).last_hidden_state  # (1, tokens, hidden)
        finally:
            _PACKED.reset(packed)
        # Gather by embedding, not by indexing. A prompt's last state predicts the first token of
        # each response, and on CPU indexing's backward adds such gradients in a nondeterministic
        # order.
        kept = torch.nn.functional.embedding(to_device(row.logit_positions, device), states[0])
        weight, bias = output_head(self.model)
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return use(kept, Head(weight, bias, softcap))


def response_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[np.ndarray],
    keep: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """Logits that predict the kept response tokens, (kept, vocab); for checks and tests."""

    def project(states: torch.Tensor, head: Head) -> torch.Tensor:
        logits = torch.nn.functional.linear(states, head.weight, head.bias)
        return torch.tanh(logits / head.softcap) * head.softcap if head.softcap else logits

    return PackedModel(model)(pack(prompts, responses, keep), project)
