"""Conversations of other tables: a cell's messages become turns, the last of which is the problem.

problem_rows.py calls `turns_of`. A cell holds a list of {role, content}, of {from, value} with
human and gpt (ShareGPT), or either as JSON text. docs/decisions/turns.md says what is refused.
"""

import json
from collections.abc import Callable
from typing import Any

from ...schemas.conversation import fault_of
from ...schemas.labels import TurnRole
from ...schemas.own_code import is_text
from ..row_files import BadRow, bad_row

_ROLES = {
    **{role.value: role for role in TurnRole},
    **{"developer": TurnRole.SYSTEM, "human": TurnRole.USER, "gpt": TurnRole.ASSISTANT},
}
_TOOLS = ("tool", "function", "ipython", "observation", "function_call", "tool_call")
_CALLS = ("tool_calls", "function_call")
_LEAVE = "mend it, or skip such rows by on_bad_rows=skip"
_NO_TOOLS = (
    "several generated turns and tools are not trained on (docs/decisions/turns.md); skip such "
    "rows by on_bad_rows=skip"
)
Turns = list[dict[str, str]]


def turns_of(
    value: Any, name: str, where: str, text: Callable[[Any, str, str], str], answered: bool
) -> Turns:
    """A cell's turns, roles in TurnRole's names.

    text: (value, column, place) -> a text of a bounded size; answered: whether the last turn is the
    assistant's, the reference to the turn of the user before it.

    Raises:
        BadRow: the cell holds no conversation that ends so, or one with tools or an image.
    """
    messages = _read(value)
    if not isinstance(messages, list):
        raise bad_row(where, f"column {name!r} holds no list of messages", _LEAVE)
    turns = [_turn(message, at, name, where, text) for at, message in enumerate(messages)]
    roles = [turn["role"] for turn in turns]
    if answered:
        if roles[-1:] != [TurnRole.ASSISTANT]:
            what = f"column {name!r} does not end with the assistant's turn"
            raise bad_row(where, what, "it gives the answer; or name a column of answers")
        roles = roles[:-1]
    elif roles[-1:] == [TurnRole.ASSISTANT]:
        what = f"column {name!r} ends with the assistant's turn, and another column is the answer's"
        how = "leave that turn out, or set source.columns.answer and solution to '' to make it the"
        raise bad_row(where, what, f"{how} reference")
    if fault := fault_of(roles):
        raise bad_row(where, f"column {name!r} {fault}", _LEAVE)
    return turns


def _turn(
    message: Any, at: int, name: str, where: str, text: Callable[[Any, str, str], str]
) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _bad(where, name, at, "is no mapping with role and content", _LEAVE)
    role = message.get("role", message.get("from"))
    if role in _TOOLS or any(message.get(key) for key in _CALLS):
        raise _bad(where, name, at, "calls a tool or is a tool's", _NO_TOOLS)
    if not isinstance(role, str) or role not in _ROLES:
        shown = f"has the unknown role {role!r:.40}"
        raise _bad(where, name, at, "has an unknown role", f"known: {', '.join(_ROLES)}", shown)
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _joined(content, at, name, where)
    said = text(content, name, where)
    if not is_text(said):
        raise _bad(where, name, at, "holds half of a surrogate pair", _LEAVE)
    if not said:
        raise _bad(where, name, at, "is empty", _LEAVE)
    return {"role": _ROLES[role], "content": said}


def _joined(parts: list[Any], at: int, name: str, where: str) -> str:
    """The texts of a content of parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(part, dict) and part.get("type", "text") != "text":
            how = "models read text alone here: skip such rows by on_bad_rows=skip"
            raise _bad(where, name, at, "holds an image or another file", how)
        if not isinstance(text, str):
            raise _bad(where, name, at, "has a part without text", _LEAVE)
        texts.append(text)
    return "\n".join(texts)


def _bad(where: str, name: str, at: int, what: str, mend: str, shown: str | None = None) -> BadRow:
    """A fault of one turn; counted alike whichever turn it is."""
    place = f"turn {at} of column {name!r}"
    return bad_row(where, f"a turn of column {name!r} {what}", mend, f"{place} {shown or what}")


def _read(value: Any) -> Any:
    """A cell, or the JSON in its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
