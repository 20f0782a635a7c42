"""Tests of programs and other metadata of problems, from the columns of other tables.

problem_rows.py calls `metadata_of`. The reward `code` reads the key `code`: {prompt, tests,
entry_point}, or {cases: [{stdin, stdout}, …]}. Rewards of one's own see all keys.
"""

import json
from typing import Any

from ..row_files import bad_row
from .columns import ColumnMap, cell

_LEAVE = "mend it, or skip such rows by on_bad_rows=skip"
_INPUTS, _OUTPUTS = ("stdin", "input"), ("stdout", "output", "expected_output")


def metadata_of(foreign: dict[str, Any], columns: ColumnMap, where: str) -> dict[str, Any] | None:
    """A row's metadata, None if no column holds any.

    Raises:
        BadRow: a column holds something else.
    """
    found: dict[str, Any] = {}
    if columns.metadata is not None:
        value = _read(cell(foreign, columns.metadata))
        if not isinstance(value, dict):
            raise bad_row(where, f"column {columns.metadata!r} holds no mapping", _LEAVE)
        found |= json.loads(json.dumps(value, default=str))
    if columns.tests is not None:
        tests = cell(foreign, columns.tests)
        if isinstance(tests, list) and all(isinstance(one, str) for one in tests):
            tests = "\n".join(tests)
        if not isinstance(tests, str) or not tests.strip():
            raise bad_row(where, f"column {columns.tests!r} holds no tests as text", _LEAVE)
        entry = cell(foreign, columns.entry_point) if columns.entry_point else ""
        if not isinstance(entry, str) or (columns.entry_point and not entry.strip()):
            raise bad_row(where, f"column {columns.entry_point!r} holds no name", _LEAVE)
        prompt = cell(foreign, columns.problem)
        prompt = prompt if isinstance(prompt, str) else ""
        found["code"] = {"prompt": prompt, "tests": tests, "entry_point": entry.strip()}
    elif columns.cases is not None:
        found["code"] = {"cases": _cases(foreign, columns.cases, where)}
    return found or None


def whole_solution(
    problem: str, solution: str | None, metadata: dict[str, Any] | None
) -> str | None:
    """A reference solution that continues its problem's text, as HumanEval's do, with that text."""
    entry = ((metadata or {}).get("code") or {}).get("entry_point")
    define = f"def {entry}("
    if solution and entry and define in problem and define not in solution:
        return f"{problem}\n    {solution}"
    return solution


def _cases(foreign: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    value = _read(cell(foreign, name))
    if isinstance(value, dict) and isinstance(value.get("inputs"), list):
        outputs = value.get("outputs")
        if isinstance(outputs, list) and len(outputs) == len(value["inputs"]):
            pairs = zip(value["inputs"], outputs, strict=True)
            value = [{"stdin": given, "stdout": wanted} for given, wanted in pairs]
    cases = []
    for case in value if isinstance(value, list) else []:
        about = case if isinstance(case, dict) else {}
        given, wanted = (
            next((about[key] for key in keys if key in about), None) for keys in (_INPUTS, _OUTPUTS)
        )
        if not isinstance(given, str) or not isinstance(wanted, str):
            raise bad_row(where, f"column {name!r} has a case without texts for both ends", _LEAVE)
        cases.append({"stdin": given, "stdout": wanted})
    if not cases:
        raise bad_row(where, f"column {name!r} holds no cases", _LEAVE)
    return cases


def _read(value: Any) -> Any:
    """A cell, or the JSON in its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
