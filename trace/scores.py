"""A teacher's scores as a table, in the place of the teacher: joined to the routed table's rows.

The offline source calls `joined` for each step's rows, and `check_scores` for every part before the
first step. sequences.py reads the joined columns, and losses.py has the loss (`losses.Scores`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..schemas.contract import outside
from ..schemas.errors import RowFault
from ..schemas.labels import Route
from .responses import Ragged, ragged
from .routed import lists_of

# Columns of a routed table with scores: k a routed token, then one a routed token.
TOP_IDS, TOP_LOGPROBS = "scored_token_ids", "scored_logprobs"
TAIL, SAMPLED = "scored_tail", "scored_sampled"
JOINED = (TOP_IDS, TOP_LOGPROBS, TAIL, SAMPLED)
# What the table holds for −∞.
NOTHING = -9999.0
_SCORED = ("top_token_ids", "top_logprobs", "tail_logprobs", "logprobs")
_BLOCK = 1 << 16  # tokens that are checked at once
_ROUNDING = 0.01  # of a sum of probabilities


@dataclass(frozen=True)
class SequenceScores:
    """Of one response's routed tokens: token_ids (routed, k) integers, logprobs (routed, k), tail
    and sampled (routed,) float32, nats. The table's own memory, not to be written."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    sampled: np.ndarray


def joined(routed: pa.Table, scores: pa.Table) -> pa.Table:
    """The routed rows with the scores of their routed tokens, as the columns JOINED.

    The scores may hold more rows and more positions, as those of rule all do. Where the teacher
    can't teach first tokens (`prompt.teacher_turn`) they lack them all, which are then GRPO's.

    Raises:
        RowFault: a row with routed tokens that has no scores, or none at one of these tokens, or
            another k than the rows before.
    """
    places = dict(zip(scores["rollout_id"].to_pylist(), range(len(scores)), strict=True))
    positions = ragged(scores["positions"])
    columns = [ragged(scores[name]) for name in _SCORED]
    routes = ragged(routed["route"])
    teaches_first = bool((positions.values.to_numpy() == 0).any())
    parts: list[list[np.ndarray]] = [[] for _ in JOINED]
    counts, k = [], 0
    rollout_ids: list[Any] = routed["rollout_id"].to_pylist()
    for row, rollout_id in enumerate(rollout_ids):
        wanted = np.flatnonzero(_row(routes, row) != int(Route.GRPO))
        count = 0
        if len(wanted):
            if (place := places.get(rollout_id)) is None:
                raise RowFault("has no scores; score the routed dataset itself", "", rollout_id)
            known = _row(positions, place)
            if wanted[0] == 0 and not teaches_first:
                wanted = wanted[1:]
            count = len(wanted)
        if count:
            at = np.searchsorted(known, wanted)
            if at[-1] >= len(known) or (known[at] != wanted).any():
                token = next(int(w) for w in wanted if w not in known)
                raise RowFault(
                    f"its routed token {token} has no scores; score the routed dataset itself, or "
                    "one that routes more",
                    "",
                    rollout_id,
                )
            width = len(_row(columns[0], place)) // len(known)
            if k not in (0, width):
                raise RowFault(
                    f"its scores have {width} tokens a position, others {k}; score again",
                    "",
                    rollout_id,
                )
            k = width
            for part, column in zip(parts, columns, strict=True):
                values = _row(column, place)
                wide = len(values) // len(known)
                # Rows are copied only where some positions are left out.
                kept = values.reshape(len(known), wide)
                part.append((kept if len(at) == len(known) else kept[at]).reshape(-1))
        counts.append(count)
    offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    for name, part, kind in zip(JOINED, parts, _KINDS, strict=True):
        wide = max(k, 1) if name in (TOP_IDS, TOP_LOGPROBS) else 1
        flat = np.concatenate([np.empty(0, kind), *part], dtype=kind)
        routed = routed.append_column(name, lists_of(flat, offsets * wide))
    return routed


_KINDS = (np.int32, np.float32, np.float32, np.float32)


def _row(lists: Ragged, row: int) -> np.ndarray:
    first, end = lists.offsets[row : row + 2]
    return lists.values.slice(first, end - first).to_numpy()


def sequence_scores(ids: Any, logprobs: Any, tail: Any, sampled: Any) -> SequenceScores | None:
    """The scores of a row from its joined lists; None without routed tokens."""
    if not len(tail):
        return None
    return SequenceScores(
        ids.reshape(len(tail), -1), logprobs.reshape(len(tail), -1), tail, sampled
    )


def check_scores(scores: pa.Table, vocab_size: int) -> None:
    """Check what the table's contract cannot: that each position has a distribution.

    vocab_size: token ids that the policy knows.

    Raises:
        RowFault: an unknown token id, a token twice at a position, no probability, or
            probabilities that do not sum to 1.
    """
    if (row := outside(scores["top_token_ids"], 0, vocab_size - 1)) is not None:
        raise RowFault(
            f"top_token_ids has a token id outside the policy's 0 … {vocab_size - 1}; score with "
            "a teacher of its vocabulary",
            "",
            scores["rollout_id"][row].as_py(),
        )
    lists = [ragged(scores[name]) for name in ("positions", *_SCORED)]
    tokens = len(lists[0].values)
    if not tokens:
        return
    ids, top = (one.values.to_numpy() for one in lists[1:3])
    tail = lists[3].values.to_numpy()
    widths = np.repeat(lists[1].lengths // np.maximum(lists[0].lengths, 1), lists[0].lengths)
    k = int(widths[0])
    if (other := np.flatnonzero(widths != k)).size:
        _fault(scores, lists[0], int(other[0]), f"not {k} tokens a position, as the rows before")
    for first in range(0, tokens, _BLOCK):
        block = slice(first, min(first + _BLOCK, tokens))
        flat = slice(block.start * k, block.stop * k)
        own, given = np.sort(ids[flat].reshape(-1, k), axis=1), top[flat].reshape(-1, k)
        mass = np.exp(given.astype(np.float64)).sum(1) + np.exp(tail[block].astype(np.float64))
        for wrong, what in (
            ((np.diff(own, axis=1) == 0).any(1), "a token twice at a position"),
            (given[:, 0] <= NOTHING, "no likeliest token at a position"),
            (np.abs(mass - 1) > _ROUNDING, "probabilities that do not sum to 1 at a position"),
        ):
            if wrong.any():
                _fault(scores, lists[0], first + int(wrong.argmax()), what)


def k_of(scores: pa.Table) -> set[int]:
    """How many tokens a position has, of `check_scores`' table; empty without positions."""
    lengths = ragged(scores["positions"]).lengths
    rows = np.flatnonzero(lengths)[:1]
    return {int(n) for n in ragged(scores["top_token_ids"]).lengths[rows] // lengths[rows]}


def _fault(scores: pa.Table, positions: Ragged, token: int, what: str) -> None:
    row = int(np.searchsorted(positions.offsets, token, side="right")) - 1
    rollout_id = scores["rollout_id"][row].as_py()
    raise RowFault(f"has {what}; score again", "", rollout_id)
