"""Strict reading of vLLM's prompt log-probabilities: a policy is trained on them.

vllm.py reads every answer here. An entry of `prompt_logprobs` holds, for a prompt's token, the k
likeliest tokens at its place and the token itself, by token id: k of them if it is among the
likeliest, else k + 1. The first entry is null. A body that is no completion may be a gateway's
temporary failure, and is asked for again. A completion with impossible values is of a broken server
or another model, and the stage stops.
"""

import math
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from ...schemas.columns import MOST_LOGPROB
from ...schemas.errors import InputError
from ...trace.scores import NOTHING
from ..endpoint import read_body
from ..terminal import visible
from .engine import Scored

_SHOWN_CHARS = 60
# Sum of the probabilities of the likeliest tokens above 1 by more than rounding.
_MOST_MASS = 1 + 1e-3
_MOST_FOREIGN = 0.5  # share of tokens whose text differs from the policy's
_TIE = 1e-3  # nats


class _Choice(BaseModel):
    prompt_logprobs: Any = None


class _Body(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


def read_scores(
    content: bytes,
    server: str,
    token_ids: list[int],
    places: list[int],
    k: int,
    size: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Scored:
    """The teacher at some places of a prompt.

    token_ids: the prompt's; places: indices into it, above 0; k: likeliest tokens, at most size;
    size: ids of the vocabulary; tokenizer: the policy's, to see whether the server has its tokens.

    Raises:
        NotACompletion: the body is something else.
        InputError: it has no prompt log-probabilities, or impossible ones, or those of other
            tokens.
    """
    entries = read_body(content, _Body).choices[0].prompt_logprobs

    def refuse(what: str, value: Any = None) -> InputError:
        shown = "" if value is None else f" ({visible(repr(value))[:_SHOWN_CHARS]})"
        return InputError(
            f"{server}: sends {what}{shown}; see whether it serves the teacher by vLLM, and "
            "restart it or use another server"
        )

    if not isinstance(entries, list):
        raise refuse("no prompt_logprobs")
    if len(entries) != len(token_ids):
        raise refuse(
            f"prompt_logprobs of another length than the prompt's {len(token_ids)}", len(entries)
        )
    ids = np.empty((len(places), k), np.int32)
    top = np.empty((len(places), k), np.float64)
    sampled = np.empty(len(places), np.float64)
    texts: list[tuple[int, str]] = []
    for row, place in enumerate(places):
        entry, token = entries[place], token_ids[place]
        if not isinstance(entry, dict) or not isinstance(own := entry.get(str(token)), dict):
            raise refuse(f"no log-probability of the prompt's token {token} at its place {place}")
        found: list[tuple[float, int]] = []
        for key, one in entry.items():
            if (logprob := _logprob(one)) is None:
                raise refuse("a log-probability that is not finite or above 0", one)
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size):
                raise refuse(f"a token id outside the policy's 0 … {size - 1}", key)
            found.append((-logprob, int(key)))
        sampled[row] = own["logprob"]
        if len(found) == k + 1:  # the prompt's token is none of the likeliest
            found.remove((-sampled[row], token))
        if len(found) != k:
            raise refuse(f"another number of likeliest tokens than the {k} asked for", len(found))
        found.sort()
        ids[row] = [key for _, key in found]
        top[row] = [-surprise for surprise, _ in found]
        if sampled[row] > top[row, 0] + _TIE:
            raise refuse("likeliest tokens that are less likely than the prompt's", entry)
        if isinstance(text := own.get("decoded_token"), str):
            texts.append((token, text))
    mass = np.exp(top).sum(1)
    if len(mass) and mass.max() > _MOST_MASS:
        raise refuse("likeliest tokens whose probabilities sum to more than 1", float(mass.max()))
    _check_texts(server, texts, tokenizer)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - mass, 0.0)) if k < size else np.full(len(mass), NOTHING)
    narrow = [np.maximum(x, NOTHING).astype(np.float32) for x in (top, tail, sampled)]
    return Scored(ids, *narrow)


def _logprob(one: Any) -> float | None:
    """The log-probability in an entry; None if it has none that is possible."""
    value: Any = one.get("logprob") if isinstance(one, dict) else None
    possible = type(value) in (int, float) and math.isfinite(value) and value <= MOST_LOGPROB
    return value if possible else None


def _check_texts(
    server: str, texts: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises InputError if most tokens have another text at the server: another vocabulary.

    Not all have to agree: a piece of a character has no text of its own, and spaces at a token's
    edge depend on how it is decoded.
    """
    own = {token: str(tokenizer.decode([token])).strip() for token in {token for token, _ in texts}}
    clear = [(token, text) for token, text in texts if "\ufffd" not in own[token] + text]
    foreign = [(token, text) for token, text in clear if own[token] != text.strip()]
    if len(foreign) > _MOST_FOREIGN * len(clear):
        token, text = foreign[0]
        raise InputError(
            f"{server}: its model has another vocabulary than the policy: token {token} is "
            f"{visible(text)[:_SHOWN_CHARS]!r} there and {visible(own[token])[:_SHOWN_CHARS]!r} "
            "here; serve a teacher of the policy's vocabulary"
        )
