"""Scores of the responses that rules choose tokens from: one value per token.

routed.py calls `token_scores`; responses.py passes the values to rules. The table's rows may be in
any order, and hold some tokens alone; only a response with all of its tokens has scores here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of some responses, flat.

    exist: (responses,) bool, whether all tokens of a response have them; offsets: (responses + 1,);
    entropy: (tokens,) float32, nats, the student's; divergence: (tokens,) float32, nats,
    KL(student‖teacher). Both are NaN where a response has none, None where no response has any.
    """

    exist: np.ndarray
    offsets: np.ndarray
    entropy: np.ndarray | None
    divergence: np.ndarray | None

    def rows(self, rows: slice) -> "TokenScores":
        """Those of consecutive responses."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        here = slice(offsets[0], offsets[-1])
        return TokenScores(
            self.exist[rows],
            offsets - offsets[0],
            None if self.entropy is None else self.entropy[here],
            None if self.divergence is None else self.divergence[here],
        )


def token_scores(scores: pa.Table, rollouts: pa.Table, offsets: np.ndarray) -> TokenScores:
    """The scores of each rollout's tokens.

    rollouts: with rollout_id; offsets: (rollouts + 1,), where each begins among the tokens.
    """
    given = [name for name in ("student_entropy", "divergence") if name in scores.column_names]
    counts = pc.list_value_length(scores["positions"]).to_numpy()
    positions = pc.list_flatten(scores["positions"]).to_numpy()
    owner, starts = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - counts
    complete = np.ones(len(counts), dtype=bool)
    complete[owner[positions != np.arange(len(positions)) - starts[owner]]] = False
    for name in given:
        complete &= scores[name].is_valid().to_numpy()
    found: Any = pc.index_in(rollouts["rollout_id"], value_set=scores["rollout_id"])
    row = pc.fill_null(found, -1).to_numpy().astype(np.int64)  # the last entries are for no row
    lengths = np.diff(offsets)
    exist = np.append(complete, False)[row] & (np.append(counts, -1)[row] == lengths)
    values = {name: np.full(offsets[-1], np.nan, dtype=np.float32) for name in given}
    for name in given:
        lists = scores[name].take(pa.array(row[exist]))
        values[name][np.repeat(exist, lengths)] = pc.list_flatten(lists).to_numpy()
    return TokenScores(exist, offsets, values.get("student_entropy"), values.get("divergence"))
