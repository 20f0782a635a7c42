"""Exact offsets between text and tokens, from the bytes of each token id.

Samplers, annotators and the viewer call it for one response; responses.py aligns the responses of a
part. No text is re-encoded: a table holds the byte string of every id, a response's text is those
bytes joined, and their cumulative lengths give each token's byte range. Works for byte-level
vocabularies (GPT-2, Qwen, SmolLM), SentencePiece with byte fallback (Llama 2, Gemma) and plain
character or word vocabularies.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..schemas.errors import InputError


@dataclass(frozen=True)
class ByteTable:
    """The bytes of every token id; special tokens have none.

    Ids beyond the table have none either: models pad their vocabulary beyond the tokenizer's.
    """

    pieces: tuple[bytes, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Byte length per id: (vocab,) int64."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    @cached_property
    def _lookup(self) -> Any:
        """The pieces, and one empty piece for ids beyond them."""
        return pa.array([*self.pieces, b""], pa.large_binary())

    def spelled(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The joined bytes of tokens, (bytes,) uint8, and where each begins, (tokens + 1,)
        int64.
        """
        taken = self._lookup.take(pa.array(np.minimum(token_ids, len(self.pieces))))
        _, offsets, joined = taken.buffers()
        starts = np.frombuffer(offsets, np.int64, len(taken) + 1)
        return np.frombuffer(joined or b"", np.uint8, int(starts[-1])), starts

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; each invalid UTF-8 byte becomes one U+FFFD."""
        return self._escaped(token_ids).translate(_ESCAPED_BYTES)

    def char_ranges(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """First character and one past the last of each token: two (tokens,) int64 arrays.

        Tokens that share a multi-byte character overlap in it.
        """
        starts, ends = self.byte_ranges(token_ids)
        edges = self.char_edges(token_ids)
        first = np.searchsorted(edges, starts, side="right") - 1
        last = np.searchsorted(edges, ends, side="left")
        return first, np.where(ends > starts, last, first)

    def byte_ranges(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """First byte and one past the last of each token: two (tokens,) int64 arrays."""
        ids = np.asarray(token_ids, dtype=np.int64)
        known = ids < len(self.pieces)
        ends = np.cumsum(np.where(known, self.lengths[np.where(known, ids, 0)], 0))
        return np.concatenate(([0], ends[:-1])) if len(ends) else ends, ends

    def token_segments(
        self, token_ids: Sequence[int], segments: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        """Segment index of each token, (tokens,) int64; −1 for tokens without bytes.

        A token belongs to the segment with its middle byte, the first of two middle ones. So of two
        segments that share a token, the one with most of its bytes gets it, ties to the earlier.

        segments: (start, end) in characters, tiling the text.
        """
        starts, ends = self.byte_ranges(token_ids)
        edges = self.char_edges(token_ids)
        bounds = edges[np.array([end for _, end in segments], dtype=np.int64)]
        middle = starts + (ends - starts - 1) // 2
        index = np.searchsorted(bounds, middle, side="right")
        return np.where(ends > starts, index, -1)

    def _escaped(self, token_ids: Sequence[int]) -> str:
        known = (self.pieces[i] for i in token_ids if i < len(self.pieces))
        return b"".join(known).decode("utf-8", "surrogateescape")

    def char_edges(self, token_ids: Sequence[int]) -> np.ndarray:
        """Byte offset of each character's start and of the text's end: (chars + 1,) int64."""
        escaped = self._escaped(token_ids)
        points = np.frombuffer(escaped.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        widths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1  # an escaped single byte
        return np.concatenate(([0], np.cumsum(widths)))


# surrogateescape's code points, one for each invalid byte.
_ESCAPED_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


def byte_table(tokenizer: PreTrainedTokenizerBase) -> ByteTable:
    """The byte table of a tokenizer.

    Raises:
        InputError: a tokenizer without a `tokenizers` back-end; its bytes are unknown.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no tokenizer.json; convert it to a fast "
            "tokenizer"
        )
    spec = json.loads(backend.to_str())
    if _mentions(spec.get("decoder"), "ByteLevel") or _mentions(
        spec.get("pre_tokenizer"), "ByteLevel"
    ):
        to_bytes = _byte_level_bytes
    elif spec["model"].get("byte_fallback") or _mentions(spec.get("decoder"), "Metaspace"):
        to_bytes = _sentencepiece_bytes
    else:
        to_bytes = _plain_bytes
    added = {entry["id"]: entry for entry in spec.get("added_tokens", [])}
    vocab = tokenizer.get_vocab()
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if index not in added:
            pieces[index] = to_bytes(token)
        elif not added[index]["special"]:
            pieces[index] = token.encode()
    return ByteTable(tuple(pieces))


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF_CHAR[char] for char in token)


def _plain_bytes(token: str) -> bytes:
    return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _mentions(node: object, kind: str) -> bool:
    """Whether a tokenizer.json node has this type, or is a sequence that contains such a node."""
    if not isinstance(node, dict):
        return False
    children = [*node.get("decoders", []), *node.get("pretokenizers", [])]
    return node.get("type") == kind or any(_mentions(child, kind) for child in children)


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself if printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable}
    return stand_ins | {byte: chr(256 + index) for index, byte in enumerate(rest)}


_BYTE_OF_CHAR = {char: byte for byte, char in _byte_level_alphabet().items()}
