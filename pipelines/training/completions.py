"""Tables of completions for the tracker: some responses of a step, their routed spans marked.

loop.py passes the trainer's sources through `SeenTables`, and gives the rows to the tracker.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ...schemas.labels import Route
from ...trace.align import ByteTable, byte_table
from ...trace.clock import Phase
from ...trace.trainer import OfflineSource, Online
from .boards import Row

_ROWS = 16  # responses of a table: the first groups of the step
_COLUMNS = (
    "rollout_id", "problem", "token_ids", "route", "reward", "advantage", "correct",
    "diagnostic_type", "coverage",
)  # fmt: skip


class SeenTables:
    """Both sources of a trainer. Keeps the first rows of a step whose completions are due."""

    def __init__(
        self, offline: OfflineSource | None, online: Online | None, every: int | None
    ) -> None:
        """every: steps between tables; None keeps none."""
        self._offline, self._online, self._every = offline, online, every
        self._kept: pa.Table | None = None

    def __call__(self, step: int) -> Any:
        assert self._offline is not None, "offline steps need routed tables"
        table = self._offline(step)
        self._keep(step, table)
        return table

    def collect(self, step: int, with_teacher: bool, phase: Phase) -> tuple[Any, dict[str, float]]:
        assert self._online is not None, "online steps need a source of rollouts"
        table, counts = self._online.collect(step, with_teacher, phase)
        self._keep(step, table)
        return table, counts

    def _keep(self, step: int, table: pa.Table) -> None:
        due = self._every is not None and step % self._every == 0
        self._kept = table.select(list(_COLUMNS)).slice(0, _ROWS) if due else None

    def rows(self, tokenizer: Any) -> list[Row]:
        """The rows of the last step; [] if its completions are not due."""
        return [] if self._kept is None else completion_rows(self._kept, _bytes_of(tokenizer))


@lru_cache(maxsize=1)
def _bytes_of(tokenizer: Any) -> ByteTable:
    return byte_table(tokenizer)


def completion_rows(routed: pa.Table, table: ByteTable) -> list[Row]:
    """A row per response of a routed table, of plain values."""
    return [
        {
            "rollout_id": row["rollout_id"],
            "problem": row["problem"],
            "response": marked_response(table, row["token_ids"], row["route"]),
            "reward": round(row["reward"], 4),
            "advantage": round(row["advantage"], 4),
            "correct": row["correct"],
            "type": row["diagnostic_type"] or "",
            "routes": _counts(row["route"]),
            "coverage": round(row["coverage"], 4),
        }
        for row in routed.to_pylist()
    ]


def marked_response(table: ByteTable, token_ids: Sequence[int], route: Sequence[int]) -> str:
    """A response's text with each run of routed tokens as ⟦route text⟧: `a ⟦fkl 4+9=13⟧ b`."""
    text = table.text(token_ids)
    if not text:
        return text
    starts, ends = table.char_ranges(token_ids)
    routes = np.asarray(route)
    edges = [0, *(np.flatnonzero(np.diff(routes)) + 1).tolist(), len(routes)]
    pieces, done = [], 0
    for first, last in pairwise(edges):
        # Two runs may share a character of several tokens: the first one has it.
        begin, done = max(done, int(starts[first])), max(done, int(ends[last - 1]))
        held = Route(int(routes[first]))
        piece = text[begin:done]
        pieces.append(piece if held is Route.GRPO else f"⟦{held.label} {piece}⟧")
    return "".join(pieces)


def _counts(route: Sequence[int]) -> str:
    """The tokens of each route that occurs: "grpo 47, fkl 12"."""
    found = np.bincount(route, minlength=len(Route))
    return ", ".join(f"{one.label} {found[one]}" for one in Route if found[one])
