"""Sequences in one row without padding, a prompt once for all responses that share it.

A row is a list of blocks: a prompt's tokens, then each response's. Everything that works on single
tokens (embedding, projections, MLP, norms) sees each token once. Attention is a loop over sequences:
a response attends to its prompt and to itself, exactly as if they stood alone, through PyTorch's
scaled_dot_product_attention with its causal kernel. Positions restart with each prompt and go on from
it in each response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..schemas.errors import InputError
from .losses import Head
from .policy import backbone, output_head

ATTENTION = "trace_packed"
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a row is laid out: the lengths of its blocks, and for each sequence, in the order given,
    the blocks that hold its prompt and its response."""

    lengths: tuple[int, ...]
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRow:
    """input_ids, position_ids: (1, tokens) int64.

    logit_positions: (kept tokens,) int64, where the hidden states stand that predict the response
    tokens asked for, one sequence after another.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    logit_positions: torch.Tensor


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[np.ndarray],
    keep: Sequence[np.ndarray] | None = None,
) -> PackedRow:
    """Pack sequences; equal prompts that follow one another are laid down once.

    keep: per sequence the response positions whose predicting states are wanted, ascending; None:
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
        # The state at one token predicts the next; a response's first is predicted by its prompt.
        wanted.append(np.where(kept == 0, prompt_end - 1, at + kept - 1))
        at += len(response)
    return PackedRow(
        torch.from_numpy(np.concatenate(blocks))[None],
        torch.from_numpy(np.concatenate(positions))[None],
        Layout(tuple(map(len, blocks)), tuple(sequences)),
        torch.from_numpy(np.concatenate(wanted)),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row; without `packed`, as in sampling, transformers' own over SDPA.

    query: (1, heads, tokens, head); key, value: (1, key heads, tokens, head). Returns
    (1, tokens, heads, head).
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # Split, not sliced: a slice's gradient is as large as the whole row.
    queries, keys, values = (x.split(packed.lengths, dim=2) for x in (query, key, value))
    out, before = [], None
    for prompt, response in packed.sequences:
        q, k, v = (
            torch.cat((blocks[prompt], blocks[response]), dim=2)
            for blocks in (queries, keys, values)
        )  # (1, heads, prompt + response, head)
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        # The prompt's queries are worked out again with each response: cheaper than a mask.
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out.append(attended if prompt != before else attended[:, :, packed.lengths[prompt] :])
        before = prompt
    return torch.cat(out, dim=2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool where causal attention within a window may look; None: everywhere."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class PackedModel(torch.nn.Module):
    """A causal language model that reads packed rows.

    One forward pass covers the backbone and whatever is made of its states and head, so that under
    FSDP the head's weights are whole while they are used.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        # Kept out of the module tree: they are parts of the model.
        self._backbone = [backbone(model)]
        model.set_attn_implementation(ATTENTION)

    def forward(self, row: PackedRow, use: Callable[[torch.Tensor, Head], T]) -> T:
        """`use` gets the states that predict the row's kept tokens, (kept, hidden), and the head."""
        (decoder,) = self._backbone
        device = next(decoder.parameters()).device
        low = self.compute_dtype != torch.float32
        with torch.autocast(device.type, dtype=self.compute_dtype, enabled=low):
            states = decoder(
                input_ids=row.input_ids.to(device),
                position_ids=row.position_ids.to(device),
                # Four-dimensional, so that no mask is made from it: packed attention needs none.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
                packed=row.layout,
                use_cache=False,
            ).last_hidden_state  # (1, tokens, hidden)
        # A gather by embedding: a prompt's last state predicts the first token of each response, and
        # on CPU indexing's backward pass adds such gradients in the order in which threads arrive.
        kept = torch.nn.functional.embedding(row.logit_positions.to(device), states[0])
        weight, bias = output_head(self.model)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return use(kept.to(self.compute_dtype) if low else kept, Head(weight, bias, softcap))


def response_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[np.ndarray],
    keep: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """Logits that predict chosen response tokens, all at once: (sum of kept, vocab)."""

    def project(states: torch.Tensor, head: Head) -> torch.Tensor:
        logits = torch.nn.functional.linear(states, head.weight, head.bias)
        return torch.tanh(logits / head.softcap) * head.softcap if head.softcap else logits

    return PackedModel(model)(pack(prompts, responses, keep), project)


@torch.no_grad()
def check_architecture(model: Any) -> None:
    """Raises InputError unless packed rows give the logits that the model itself gives.

    Some architectures attend in a way of their own or scale their logits behind the head; training
    on other logits than the sampler's would be silent.
    """
    prompts = [[1, 2, 3], [1, 2, 3], [3, 1]]
    responses = [np.array([0, 2]), np.array([2]), np.array([1, 3, 2])]
    # transformers' SDPA leaves a soft cap in the attention out; an inference engine would not.
    capped = getattr(model.config, "attn_logit_softcapping", None)
    theirs = []  # first: packing replaces the attention that the model came with
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response.tolist()]], device=model.device)
        theirs.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
    ours = response_logits(model, prompts, responses)
    expected = torch.cat(theirs).float()
    # Two kernels may differ by a tenth in bfloat16; another architecture differs by far more.
    tolerance = 0.2 if model.dtype in (torch.bfloat16, torch.float16) else 0.01
    if capped or (ours.float() - expected).norm() > tolerance * expected.norm():
        raise InputError(
            f"policy {model.config.model_type}: this architecture attends to its tokens or changes "
            "its logits behind the head in a way that the trainer does not know; use another policy"
        )
