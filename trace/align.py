"""Exact offsets between text and tokens, from the bytes of each token id.

Samplers, annotators and the viewer call it for one response; responses.py aligns the responses of a
part. No text is re-encoded: a table holds the byte string of every id, a response's text is those
bytes joined, and their cumulative lengths give each token's byte range. Works for byte-level
vocabularies (GPT-2, GPT-4o, Qwen, Llama 3, DeepSeek, SmolLM), SentencePiece with byte fallback
(Llama 2, Gemma) and plain character or word vocabularies.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..schemas.errors import InputError

if TYPE_CHECKING:  # stage convert starts without it
    from transformers import PreTrainedTokenizerBase


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


def byte_table(tokenizer: "PreTrainedTokenizerBase") -> ByteTable:
    """The byte table of a tokenizer.

    Raises:
        InputError: a tokenizer without a `tokenizers` back-end, or with a decoder that spells no
            token by itself (WordPiece); its bytes are unknown.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no tokenizer.json; convert it to a fast "
            "tokenizer"
        )
    spec = json.loads(backend.to_str())
    to_bytes = _speller(spec, tokenizer.name_or_path)
    special = {entry["id"] for entry in spec["added_tokens"] if entry["special"]}
    tokens = map(backend.id_to_token, range(max(tokenizer.get_vocab().values()) + 1))
    return ByteTable(
        tuple(
            b"" if token is None or index in special else to_bytes(token)
            for index, token in enumerate(tokens)
        )
    )


def _speller(spec: dict[str, Any], name: str) -> Callable[[str], bytes]:
    """What the decoder of a tokenizer.json makes of a token behind another one.

    Ordinary and added tokens pass the same decoder: Gemma's added `▁▁` are two spaces. A decoder
    that strips the text's first space (Llama 2) does not reach a response, which has a prompt
    before it.
    """
    nodes: list[dict[str, Any]] = list(_nodes(spec["decoder"]))
    if not nodes:
        if any(node["type"] == "ByteLevel" for node in _nodes(spec["pre_tokenizer"])):
            nodes = [{"type": "ByteLevel"}]
        elif spec["model"].get("byte_fallback"):
            nodes = [{"type": "Metaspace", "replacement": "▁"}, {"type": "ByteFallback"}]
    kinds = {node["type"] for node in nodes}
    spaces = [node["replacement"] for node in nodes if node["type"] == "Metaspace"]
    replaced = [(space, " ") for space in spaces]
    for node in nodes:
        if node["type"] == "Replace" and "String" in node["pattern"]:
            replaced.append((node["pattern"]["String"], node["content"]))
        elif node["type"] not in ("ByteLevel", "ByteFallback", "Metaspace", "Fuse", "Strip"):
            raise InputError(
                f"tokenizer {name}: its decoder {node['type']} spells no token by itself; use a "
                "policy with a byte-level or SentencePiece vocabulary"
            )

    def spell(token: str) -> bytes:
        if "ByteLevel" in kinds:
            try:
                return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
            except KeyError:  # an added token with characters of its own
                return token.encode()
        for old, new in replaced:
            token = token.replace(old, new)
        if "ByteFallback" in kinds and (byte := _FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()

    return spell


def _nodes(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder of a tokenizer.json, its sequences flattened."""
    if node is not None and node["type"] == "Sequence":
        for child in node.get("decoders") or node.get("pretokenizers") or ():
            yield from _nodes(child)
    elif node is not None:
        yield node


_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself if printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable}
    return stand_ins | {byte: chr(256 + index) for index, byte in enumerate(rest)}


_BYTE_OF_CHAR = {char: byte for byte, char in _byte_level_alphabet().items()}
