"""Packing: sequences in one row without padding, a prompt once for all responses that share it.

sequences.py builds the rows, trainer.py passes them to a PackedModel. A row is a list of blocks: a
prompt's tokens, then each response's. Operations on single tokens (embedding, projections, MLP,
norms) see each token once. Attention loops over sequences: a response attends to its prompt and to
itself, as if the two were alone, through PyTorch's scaled_dot_product_attention with its causal
kernel. Positions restart with each prompt and continue from it in each response.
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
    """A row's blocks: their lengths, and (prompt's block, response's block) of each sequence."""

    lengths: tuple[int, ...]
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRow:
    """input_ids, position_ids: (1, tokens) int64.

    logit_positions: (kept tokens,) int64, positions of the hidden states that predict the kept
    response tokens, one sequence after another.
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
    """Attention of a packed row; without `packed` (sampling) transformers' own SDPA attention.

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
    # Split, not sliced: a slice's gradient is as large as the row.
    queries, keys, values = (x.split(packed.lengths, dim=2) for x in (query, key, value))
    out, before = [], None
    for prompt, response in packed.sequences:
        q, k, v = (
            torch.cat((blocks[prompt], blocks[response]), dim=2)
            for blocks in (queries, keys, values)
        )  # (1, heads, prompt + response, head)
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        # The prompt's queries are recomputed with each response, which is cheaper than a mask.
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out.append(attended if prompt != before else attended[:, :, packed.lengths[prompt] :])
        before = prompt
    return torch.cat(out, dim=2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool mask of causal attention within a window; None: no mask needed."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
        states = decoder(
            input_ids=row.input_ids.to(device),
            position_ids=row.position_ids.to(device),
            # Four-dimensional, so that transformers builds no mask: packed attention needs none.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            packed=row.layout,
            use_cache=False,
        ).last_hidden_state  # (1, tokens, hidden)
        # Gather by embedding, not by indexing. A prompt's last state predicts the first token of
        # each response, and on CPU indexing's backward adds such gradients in a nondeterministic
        # order.
        kept = torch.nn.functional.embedding(row.logit_positions.to(device), states[0])
        weight, bias = output_head(self.model)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
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


@torch.no_grad()
def check_architecture(model: Any) -> None:
    """Check that packed rows give the model's own logits.

    Some architectures have another attention or scale their logits after the head. Without this
    check training would silently use other logits than the sampler.

    Raises:
        InputError: the logits differ.
    """
    prompts = [[1, 2, 3], [1, 2, 3], [3, 1]]
    responses = [np.array([0, 2]), np.array([2]), np.array([1, 3, 2])]
    # transformers' SDPA ignores a soft cap in the attention; inference engines apply it.
    capped = getattr(model.config, "attn_logit_softcapping", None)
    theirs = []  # first: packing replaces the model's own attention
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response.tolist()]], device=model.device)
        theirs.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
    ours = response_logits(model, prompts, responses)
    expected = torch.cat(theirs).float()
    # Two kernels may differ by a tenth in bfloat16; another architecture differs by far more.
    tolerance = 0.2 if model.dtype in (torch.bfloat16, torch.float16) else 0.01
    if capped or (ours.float() - expected).norm() > tolerance * expected.norm():
        raise InputError(
            f"policy {model.config.model_type}: the trainer does not know this architecture's "
            "attention, or what it does to its logits after the head; use another policy"
        )
