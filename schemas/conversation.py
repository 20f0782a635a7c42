"""Turns before a problem: their column, their faults, and the problem's text with them.

Tables problems and routed have the column `history`. Sources check conversations with `fault_of`;
the viewer, the terminal and the annotators' prompt show problems by `shown`.
docs/decisions/turns.md says what a conversation may hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import STRING
from .contract import described
from .labels import TurnRole

# A turn: {"role": of TurnRole, "content": text}.
Turn = Mapping[str, Any]
History = Sequence[Turn] | None
COLUMN = "history"
HISTORY = described(
    COLUMN,
    pa.list_(
        pa.struct(
            [
                described("role", STRING, "system, user or assistant (TurnRole)."),
                described("content", STRING, "The turn's text."),
            ]
        )
    ),
    "The conversation's turns before the problem, which is its last turn and the user's; null: "
    "none. A system turn stands first, in place of prompt.system.",
    True,
)
ODD_TURNS = (
    COLUMN,
    "has a turn without text, or a system turn that is not the first; drop that turn",
)
_INDENT = "    "


def fault_of(roles: Sequence[str]) -> str | None:
    """What is wrong with the order of a conversation's turns, whose last is to be answered."""
    if not roles:
        return "has no turns"
    if roles.count(TurnRole.SYSTEM) > 1:
        return "has two system turns"
    if TurnRole.SYSTEM in roles[1:]:
        return "has a system turn that is not the first"
    if roles[-1] != TurnRole.USER:
        return f"ends with the turn of {roles[-1]}, not of user"
    return None


def odd_turns(table: pa.Table) -> pa.Array:
    """Rows with a turn without text, or with a system turn that is not the first."""
    mask = np.zeros(len(table), dtype=bool)
    if COLUMN in table.column_names:
        lists: Any = table[COLUMN].combine_chunks()
        turns, rows = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        role, content = (_field(turns, name) for name in ("role", "content"))
        first = np.diff(rows, prepend=-1) != 0
        bad = _true(pc.equal(role, pa.scalar(str(TurnRole.SYSTEM)))) & ~first
        bad |= _true(pc.equal(pc.utf8_trim_whitespace(content), pa.scalar("")))
        bad |= ~_true(pc.is_valid(content)) | ~_true(pc.is_valid(role))
        mask[rows[bad]] = True
    return pa.array(mask)


def shown(problem: str, history: History) -> str:
    """A problem's text for a person or an annotator; a conversation turn by turn.

    A turn's role stands at the start of its line and the other lines of a turn are indented, so
    that no text can forge a turn.
    """
    if not history:
        return problem
    turns = [*history, {"role": TurnRole.USER, "content": problem}]
    return "\n".join(
        ["A conversation, whose last turn is to be answered:", *map(_shown_turn, turns)]
    )


def shown_row(row: Mapping[str, Any]) -> str:
    """`shown` of a row of table problems."""
    return shown(row["problem"], row.get(COLUMN))


def wording(problems: pa.Table) -> pa.ChunkedArray:
    """The problems' texts with those of their earlier turns, but for system turns: what two
    datasets may share."""
    if COLUMN not in problems.column_names:
        return problems["problem"]
    texts = []
    for problem, history in zip(
        *(problems[n].to_pylist() for n in ("problem", COLUMN)), strict=True
    ):
        said = [turn["content"] for turn in history or () if turn["role"] != TurnRole.SYSTEM]
        texts.append("\n\n".join([*said, str(problem)]))
    return pa.chunked_array([pa.array(texts, pa.string())])


def with_history(names: Sequence[str], table: pa.Table) -> list[str]:
    """Columns to select of a table, with the history if it has one."""
    return [*names, *(name for name in [COLUMN] if name in table.column_names)]


def history_key(history: History) -> tuple[tuple[str, str], ...]:
    """The turns as a key of dictionaries; empty without any."""
    return tuple((str(turn["role"]), str(turn["content"])) for turn in history or ())


def _shown_turn(turn: Turn) -> str:
    first, *rest = str(turn["content"]).strip().splitlines() or [""]
    return "\n".join([f"[{turn['role']}] {first}", *(_INDENT + line for line in rest)])


def _field(turns: Any, name: str) -> Any:
    return pc.struct_field(turns, name)


def _true(mask: Any) -> np.ndarray:
    """(entries,) bool; null is false."""
    return pc.fill_null(mask, pa.scalar(False)).to_numpy(zero_copy_only=False)
