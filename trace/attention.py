"""Attention of packed rows, in the way that suits the device and the lengths.

packing.py passes a row's Layout through the model to `packed_attention`, which is registered with
transformers. A response attends to its prompt and to itself, as if the two were alone:

- loop: PyTorch's scaled_dot_product_attention, a sequence at a time. The CPU's way.
- padded: the same by cuDNN or FlashAttention at few distinct lengths, for long sequences on CUDA.
- varlen: one call of FlashAttention for all sequences of a row, for many short ones and for windows
  on CUDA.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .transfer import to_device

ATTENTION = "trace_packed"
Way = Literal["loop", "padded", "varlen"]
# Query (1, heads, tokens, head), key and value (1, key heads, tokens, head).
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Multiple of the padded lengths: cuDNN makes a plan for each length that it meets.
BUCKET = 1024
# Mean tokens of a row's sequences from which they are padded, on average by half a bucket.
_LONG = 4 * BUCKET
# In this order. cuDNN's is the fastest where it runs; EFFICIENT runs in float32 and with masks.
_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Offsets(NamedTuple):
    """Where each sequence's queries and keys begin, with the end: (sequences + 1,) int32 each.

    most_queries, most_keys: of one sequence.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int


class Layout:
    """A row's blocks: their lengths, and (prompt's block, response's block) of each sequence.

    Blocks are in the order in which sequences read them first. Not a dataclass, whose entries
    torch.compile would guard, and compile again for each row.
    """

    def __init__(self, lengths: Sequence[int], sequences: Sequence[tuple[int, int]]) -> None:
        self.lengths = tuple(lengths)
        self.sequences = tuple(sequences)
        self.tokens = tuple(self.lengths[p] + self.lengths[r] for p, r in sequences)  # of each
        self._offsets: dict[torch.device, Offsets] = {}

    @property
    def shares(self) -> bool:
        """Whether sequences share prompts."""
        return 2 * len(self.sequences) > len(self.lengths)

    def offsets(self, device: torch.device) -> Offsets:
        """Made once a row: all layers read the same."""
        if device not in self._offsets:
            queries, read = [], set()
            for (prompt, response), tokens in zip(self.sequences, self.tokens, strict=True):
                queries.append(self.lengths[response] if prompt in read else tokens)
                read.add(prompt)
            own, read_keys = (
                to_device(torch.tensor([0, *sizes]).cumsum(0).int(), device)
                for sizes in (queries, self.tokens)
            )
            self._offsets[device] = Offsets(own, read_keys, max(queries), max(self.tokens))
        return self._offsets[device]


def choose_way(device: str, flash: bool, tokens: Sequence[int], window: int | None) -> Way:
    """How to compute a row's attention.

    device: its type; flash: whether variable-length FlashAttention takes the states; tokens: of
    each sequence, its prompt included; window: in tokens.
    """
    if device != "cuda":
        return "loop"
    # The other ways need a quadratic mask for a window.
    windowed = window is not None and max(tokens) > window
    short = sum(tokens) < _LONG * len(tokens)
    return "varlen" if flash and (windowed or short) else "padded"


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
    states, window = (query, key, value), _window(attention_mask)
    flash = _flash_takes(states) and _varlen_options() is not None
    way = choose_way(query.device.type, flash, packed.tokens, window)
    return WAYS[way](states, packed, window, scaling), None


def loop(
    states: States,
    layout: Layout,
    window: int | None,
    scaling: float | None,
    bucket: int = 1,
    grouped: bool = False,
) -> torch.Tensor:
    """A call of scaled_dot_product_attention a sequence.

    bucket: sequences are padded to a multiple of it. The padding is at the end, where a causal mask
    hides it. grouped: the kernel reads a key head for several query heads.
    """
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not grouped:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # Split, not sliced: a slice's gradient is as large as the row.
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    out, read = [], set()
    for (prompt, response), tokens in zip(layout.sequences, layout.tokens, strict=True):
        padding = -tokens % bucket
        q, k, v = (
            torch.cat((blocks[prompt], blocks[response], *_zeros(blocks[prompt], padding)), dim=2)
            for blocks in (queries, keys, values)
        )  # (1, heads, prompt + response + padding, head)
        mask = _window_mask(q.shape[2], window, q.device)
        # The prompt's queries are recomputed with each response, which is cheaper than a mask.
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        first = layout.lengths[prompt] if prompt in read else 0
        whole = first == padding == 0
        out.append(attended if whole else attended[:, :, first:tokens])
        read.add(prompt)
    # Contiguous as transformers' own: some models view the result in another shape.
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def padded(
    states: States, layout: Layout, window: int | None, scaling: float | None
) -> torch.Tensor:
    """`loop` at lengths that are multiples of BUCKET, by the fastest kernel that runs."""
    # Kernels for float32 and for masks read no grouped keys.
    grouped = window is None and _flash_takes(states)
    with sdpa_kernel(_KERNELS, set_priority=True):
        return loop(states, layout, window, scaling, BUCKET, grouped)


def varlen(
    states: States, layout: Layout, window: int | None, scaling: float | None
) -> torch.Tensor:
    """One call of variable-length FlashAttention.

    A prompt's queries belong to the first sequence that reads it. A later sequence has more keys
    than queries, and its queries are the last: FlashAttention aligns its causal mask there.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = states
    if layout.shares:
        order = [block for sequence in layout.sequences for block in sequence]
        # Split and joined, not indexed, whose gradient is added up in no fixed order.
        key, value = (
            torch.cat([blocks[block] for block in order], dim=2)
            for blocks in (x.split(layout.lengths, dim=2) for x in (key, value))
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head)
    last = -1 if window is None else window - 1  # the farthest token before
    options: dict[str, Any] = _varlen_options() or {}
    out: Any = varlen_attn(
        q, k, v, *layout.offsets(q.device), scale=scaling, window_size=(last, 0), **options
    )
    return out[None].contiguous()


# They return (1, tokens, heads, head).
WAYS: dict[Way, Callable[..., torch.Tensor]] = {"loop": loop, "padded": padded, "varlen": varlen}


@cache
def _varlen_options() -> dict[str, bool] | None:
    """Arguments that let PyTorch's varlen_attn read grouped keys; None: it knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    return {"enable_gqa": True} if "enable_gqa" in known else {}


def _flash_takes(states: States) -> bool:
    """FlashAttention's limits: types, head sizes, and GPUs from Ampere on."""
    query, _, value = states
    head = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and head == value.shape[-1]
        and head <= 256
        and head % 8 == 0
        and (not query.is_cuda or _capability(query.device) >= (8, 0))
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _zeros(like: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Padding to join; none at all for 0 tokens."""
    return [like.new_zeros(*like.shape[:2], tokens, like.shape[3])] if tokens else []


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool mask of causal attention within a window; None: no mask needed."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < window)


_PACKED: ContextVar[bool] = ContextVar("packed", default=False)


@contextmanager
def masks_of_packed_rows() -> Iterator[None]:
    """A context in which models get the masks of packed rows."""
    before = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(before)


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
