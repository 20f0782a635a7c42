"""Packing: sequences in one row without padding, a prompt once for all responses that share it.

sequences.py builds the rows, trainer.py passes them to a PackedModel. A row is a list of blocks: a
prompt's tokens, then each response's. Operations on single tokens (embedding, projections, MLP,
norms) see each token once; attention.py computes each sequence as if it were alone. Positions
restart with each prompt and continue from it in each response.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from .attention import ATTENTION, Layout, masks_of_packed_rows
from .losses import Head
from .policy import backbone, output_head
from .rope import Regime, frequencies_by_block, length_ropes, regime
from .transfer import to_device

T = TypeVar("T")


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
        Layout([len(block) for block in blocks], sequences),
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
    layout = Layout([lengths[block] for block in blocks], sequences)
    return PackedRow(ids, positions, layout, torch.cat(wanted), row.kept), regimes


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
        with frequencies, masks_of_packed_rows():
            states = decoder(
                input_ids=to_device(row.input_ids, device),
                position_ids=to_device(row.position_ids, device),
                # Two-dimensional, or transformers would derive sequences from the positions.
                attention_mask=torch.ones_like(row.input_ids, dtype=torch.bool, device=device),
                packed=row.layout,
                use_cache=False,
            ).last_hidden_state  # (1, tokens, hidden)
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
