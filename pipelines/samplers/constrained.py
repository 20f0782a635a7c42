"""Constrained decoding: the tokens that may follow, so that a response matches a JSON schema.

Engine transformers masks its logits with `Grammars`, which asks llguidance per row and step; the
other engines send the schema of `with_fixed_whitespace`. Whitespace is fixed to that of
`json.dumps`: a small model that may choose it repeats it until the token limit.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from ...schemas.errors import InputError
from ...trace.align import byte_table

_AS_JSON_DUMPS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def with_fixed_whitespace(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with llguidance's own keyword, which other validators ignore."""
    return schema | {"x-guidance": _AS_JSON_DUMPS}


def require_writable(
    tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any], otherwise: str
) -> None:
    """Check that a vocabulary has a token for each character that a schema requires.

    otherwise: the setting that turns constrained decoding off, for the error.

    Raises:
        InputError: a character without a token, at which decoding would stop.
    """
    alone = set(byte_table(tokenizer).pieces)
    required = "0123456789" + json.dumps(schema)  # with its keywords: letters like any others
    lacking = [
        char
        for char in dict.fromkeys(required)
        if char.encode() not in alone and not {bytes([b]) for b in char.encode()} <= alone
    ]
    if lacking:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no token for {lacking[0]!r}, so its policy "
            f"can't write JSON; let another policy or engine annotate, or set {otherwise}"
        )


class _Vocabulary:
    """A tokenizer in llguidance's form: the bytes of each id, and canonical encoding.

    llguidance's own reader knows fewer kinds of tokenizers than `byte_table`.
    """

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.tokens = byte_table(tokenizer).pieces
        self.special_token_ids = [index for index, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(), add_special_tokens=False)


class Grammars:
    """Schemas compiled for one vocabulary, once each, and copied per response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        """ends: the tokens that end a response."""
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=ends)
        self._compiled: dict[str, LLMatcher] = {}

    def start(self, schema: dict[str, Any]) -> LLMatcher:
        """A matcher at the beginning of a response.

        Raises:
            InputError: a schema that can't be compiled.
        """
        text = json.dumps(with_fixed_whitespace(schema))
        if text not in self._compiled:
            grammar = LLMatcher.grammar_from_json_schema(text)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            _check(matcher)
            self._compiled[text] = matcher
        return self._compiled[text].deep_copy()

    def allowed(self, matchers: Sequence[LLMatcher | None], width: int) -> torch.Tensor:
        """Tokens that may follow: (rows, width) bool on the CPU; all tokens for a None matcher.

        width: of the logits; ids past the vocabulary (padding of the head) are never allowed.

        Raises:
            InputError: the vocabulary has no token that may follow.
        """
        flags = np.zeros((len(matchers), width), dtype=np.bool_)
        for row, matcher in enumerate(matchers):
            if matcher is None:
                flags[row] = True
                continue
            biases = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)
            flags[row, : len(biases)] = biases[:width]
            _check(matcher)
        return torch.from_numpy(flags)


def _check(matcher: LLMatcher) -> None:
    """Raise a matcher's error: it only records it."""
    if matcher.is_error():
        error = " ".join(matcher.get_error().split())
        raise InputError(
            f"constrained decoding: the JSON schema can't be followed ({error:.200}); simplify it, "
            "or sample without a schema"
        )
