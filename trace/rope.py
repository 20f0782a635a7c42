"""Rotary embeddings whose frequencies depend on a sequence's length, in packed rows.

packing.py calls this file. transformers computes such frequencies (rope types longrope and dynamic)
from the largest position in the row, and dynamic ones also from the rows before. Here each sequence
gets the frequencies that it has in a row of its own, as transformers' sampler does.

vLLM chooses once for all sequences. For longrope it takes the long factors if `max_model_len`
exceeds the original length, by default the short ones; it does not scale dynamic frequencies at
all. So it agrees up to the original length with `max_model_len` at most that length, and otherwise
the probe at each hand-over of weights reports other logits.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .transfer import to_device

Regime = tuple[int, ...]


@dataclass(frozen=True)
class LengthRope:
    """One rotary module's rule for one layer type. limit: tokens up to which lengths are alike."""

    module: torch.nn.Module
    dynamic: bool
    limit: int


def length_ropes(decoder: torch.nn.Module) -> list[LengthRope]:
    """The rotary embeddings in a model that depend on a sequence's length."""
    found = []
    for module in decoder.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, kind in types.items() if isinstance(types, dict) else [(None, types)]:
            parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
            if kind == "longrope":
                own = parameters if layer_type is None else parameters[layer_type]
                limit = own["original_max_position_embeddings"]
                found.append(LengthRope(module, dynamic=False, limit=limit))
            elif kind == "dynamic":
                limit = int(module.original_max_seq_len)  # type: ignore[arg-type]
                found.append(LengthRope(module, dynamic=True, limit=limit))
    return found


def regime(ropes: Sequence[LengthRope], length: int) -> Regime:
    """Equal for lengths whose sequences have the same frequencies."""
    return tuple((length if rope.dynamic else 1) if length > rope.limit else 0 for rope in ropes)


@contextmanager
def frequencies_by_block(
    ropes: Sequence[LengthRope], lengths: Sequence[int], regimes: Sequence[Regime]
) -> Iterator[None]:
    """A context in which rotary modules compute each block as in a row of its regime alone.

    lengths: tokens of each block of the row. regimes: of the sequences that the block belongs to.
    """
    tokens: dict[Regime, list[torch.Tensor]] = {}
    at = 0
    for length, own in zip(lengths, regimes, strict=True):
        tokens.setdefault(own, []).append(torch.arange(at, at + length))
        at += length
    groups = [torch.cat(parts) for parts in tokens.values()]
    modules = {id(rope.module): rope.module for rope in ropes}.values()
    for module in modules:
        module.forward = partial(_by_group, module, type(module).forward, groups)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _by_group(
    module: torch.nn.Module,
    forward: Any,
    groups: list[torch.Tensor],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary module's cosines and sines, (1, tokens, rotated), of each group of tokens alone."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    device = position_ids.device
    for group in groups:
        # transformers replaces buffers, so the module itself stays as it is.
        own = copy.copy(module)
        own._buffers = module._buffers.copy()
        # A short sequence clears what longer ones before it have left.
        forward(own, x, position_ids.new_zeros(1, 1), *args, **kwargs)
        parts.append(forward(own, x, position_ids[:, to_device(group, device)], *args, **kwargs))
    order = to_device(torch.argsort(torch.cat(groups)), device)
    cos, sin = (torch.cat(one, dim=1)[:, order] for one in zip(*parts, strict=True))
    return cos, sin
