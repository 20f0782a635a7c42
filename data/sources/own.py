"""A source of your own: `source={kind: file.py:Class}`. `OwnSource` below is its manual.

The source of kind `file.py:Class` or `module:Class`, called through `sources.rows` by stage
problems. examples/own-code/source.py is a worked example.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from ...schemas.configs import OwnSource as OwnSourceConfig
from ...schemas.conversation import COLUMN, fault_of
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, DiagnosticType, TurnRole
from ...schemas.own_code import OwnCode, build, is_text, iterable, require_methods, running
from ...schemas.tables import PROBLEMS
from ..manifest import content_hash

_STEP = {"text": str, "value": str, "type": str, "key": bool}


class OwnSource(Protocol):
    """A class that yields problems.

    It is built with `options`, if its `__init__` names them: `source.options` of the config. If the
    class has an attribute `Options`, a dataclass or a pydantic model, they are validated by it and
    passed as its instance; else as a dict.

    `rows` yields a dict per problem. The same options and seed must give the same rows.

    - problem, answer: text, not empty.
    - answer_kind: math (the default), choice, or text, which is compared as it is and may be
      anything that a reward of your own understands.
    - solution: a reference solution for the annotator.
    - steps: known steps for the rule annotator, dicts of text, value, type (DiagnosticType) and
      key.
    - source: a name; by default the class's. With several, an evaluation weighs them equally.
    - source_id, subject, level: texts that are kept with the problem.
    - history: the turns before the problem, dicts of role (system, user, assistant) and content.

    Optional:

    - endless = True: rows never end, so the config must set `limit`.
    - identity(): what else determines the rows, as JSON data; it goes into the dataset's id. A
      source that reads a file returns the file's hash here.
    """

    def rows(self, seed: int) -> Iterable[dict[str, Any]]: ...


def rows(source: OwnSourceConfig, seed: int) -> Iterator[dict[str, Any]]:
    """The class's rows, checked.

    Raises:
        InputError: the class raises, yields no row, or a row that is no problem.
    """
    code = _load(source)
    own = build(code, source.options)
    with running(code):
        found = iter(iterable(code, "rows", own.rows(seed)))
    count = 0
    while True:
        with running(code):
            row = next(found, None)
        if row is None:
            break
        yield _checked(row, count, code)
        count += 1
    if not count:
        raise InputError(f"{code.label}: yielded no row")


def identity(source: OwnSourceConfig) -> dict[str, Any]:
    code = _load(source)
    own = build(code, source.options)
    if not hasattr(own, "identity"):
        return source.semantic()
    with running(code):
        found = own.identity()
    try:
        content_hash(found)
    except (TypeError, ValueError) as error:
        raise InputError(f"{code.label}: identity() returned no JSON data ({error})") from None
    return source.semantic() | {"identity": found}


def endless(source: OwnSourceConfig) -> bool:
    return bool(getattr(_load(source).value, "endless", False))


def _load(source: OwnSourceConfig) -> OwnCode:
    code = source.load("source.kind")
    require_methods(code, rows="seed")
    return code


def _checked(row: Any, index: int, code: OwnCode) -> dict[str, Any]:
    where = f"{code.label}: row {index}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: is {type(row).__name__}, not a dict")
    defaults = {"answer_kind": "math", "solution": None, "steps": None}
    defaults["source"] = code.value.__name__
    known = ("problem", "answer", *defaults, *PROBLEMS.optional)
    for name in row:
        if name not in known:
            raise InputError(f"{where}: has the unknown key {name!r}; known: {', '.join(known)}")
    row = defaults | row
    for name in ("problem", "answer", "source"):
        if not is_text(row.get(name)) or not row[name].strip():
            raise InputError(f"{where}: {name} is not text, or is empty")
    if row["answer_kind"] not in list(AnswerKind):
        raise InputError(f"{where}: answer_kind is none of {', '.join(AnswerKind)}")
    for name in ("solution", *PROBLEMS.optional):
        if name != COLUMN and row.get(name) is not None and not is_text(row[name]):
            raise InputError(f"{where}: {name} is neither text nor None")
    _check_history(row.get(COLUMN), where)
    if not isinstance(row["steps"], list | tuple | None):
        raise InputError(f"{where}: steps is neither a list nor None")
    for step in row["steps"] or []:
        typed = isinstance(step, dict) and step.keys() == _STEP.keys()
        if not typed or not all(
            is_text(step[name]) if kind is str else isinstance(step[name], kind)
            for name, kind in _STEP.items()
        ):
            raise InputError(f"{where}: a step is no dict of text, value, type and key (a bool)")
        if step["type"] not in list(DiagnosticType):
            raise InputError(
                f"{where}: a step's type is none of {', '.join(DiagnosticType)}; it names what the "
                "step takes (annotator.error_types makes a mistake of it)"
            )
    return row


def _check_history(history: Any, where: str) -> None:
    if history is None:
        return
    if not isinstance(history, list | tuple):
        raise InputError(f"{where}: history is neither a list nor None")
    for turn in history:
        filled = isinstance(turn, dict) and turn.keys() == {"role", "content"}
        if not filled or turn["role"] not in list(TurnRole) or not is_text(turn["content"]):
            raise InputError(
                f"{where}: a turn of history is no dict of role ({', '.join(TurnRole)}) and content"
            )
        if not turn["content"].strip():
            raise InputError(f"{where}: a turn of history is empty")
    if fault := fault_of([*(turn["role"] for turn in history), TurnRole.USER]):
        raise InputError(f"{where}: history {fault}")
