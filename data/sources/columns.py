"""The column map: which columns of another table hold the problem, the answer, the solution.

Sources `files` and `hub` call `resolve`, then `problem_row` (problem_rows.py) for each row. A
column is recognised by its name. Names are compared without case, and with `_` for a space or dash.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ...schemas.configs import Columns, template_fields
from ...schemas.errors import InputError

# The first name is the role's own: it wins. Two others of a role are refused.
KNOWN = {
    "problem": (
        "problem", "question", "prompt", "query", "input", "instruction", "problem_text",
        "question_text", "problem_statement",
    ),
    "answer": (
        "answer", "final_answer", "gold", "gold_answer", "target", "ground_truth",
        "reference_answer", "expected_answer", "correct_answer", "answer_key", "answerkey",
        "reward_model.ground_truth",
    ),
    "solution": (
        "solution", "rationale", "explanation", "reference_solution", "gold_solution",
        "ground_truth_solution", "worked_solution",
    ),
}  # fmt: skip
# Of these the first that is there is taken: nothing is judged or trained by them.
KNOWN_ABOUT = {
    "id": (
        "id", "unique_id", "problem_id", "question_id", "uuid", "uid", "index", "idx",
        "extra_info.index",
    ),
    "subject": ("subject", "topic", "category", "domain", "type"),
    "level": ("level", "difficulty", "grade"),
}  # fmt: skip
# HumanEval's columns of a program's tests, taken together where no column holds an answer.
_CODE = {"tests": "test", "entry_point": "entry_point"}
_CODE_ABOUT = {"solution": "canonical_solution", "id": "task_id"}
_CHOICE_LISTS = ("choices", "options")
_CHOICE_ANSWERS = ("label", "correct", "correct_option", "answer_index", "correct_index")
_WRONG_CHOICES = ("incorrect_answer", "wrong_answer", "distractor")


@dataclass(frozen=True)
class Found:
    """What a table holds. names: of its columns, nested ones with a dot; hashed: those with a text
    that has `#### ` before a final answer; lists: those that hold lists or mappings; images: those
    that hold files such as images."""

    names: tuple[str, ...]
    hashed: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()


_JUDGING = ("tests", "entry_point", "cases", "metadata")
_LATE = (
    "id", "subject", "level", "final", *_JUDGING, "template", "answer_template", "messages",
)  # fmt: skip


@dataclass(frozen=True)
class ColumnMap:
    """The columns of a table by role.

    choices: columns of wrong choices, or the column of a list of all choices. final: the answer
    column holds a longer text; its answer follows `####` ("hashes"), or is in a box or follows
    `####` ("solution"). answer: empty where a program's tests judge. tests, entry_point, cases: of
    programs; metadata: a mapping for rewards of one's own. template, answer_template: stand for an
    empty problem or answer. messages: conversations, in place of a problem; where answer names that
    column too, a conversation's last turn is the reference. images: columns whose rows are refused
    if they are filled.
    """

    problem: str
    answer: str
    solution: str | None = None
    choices: list[str] | str | None = None
    id: str | None = None
    subject: str | None = None
    level: str | None = None
    final: Literal["hashes", "solution"] | None = None
    tests: str | None = None
    entry_point: str | None = None
    cases: str | None = None
    metadata: str | None = None
    template: str | None = None
    answer_template: str | None = None
    messages: str | None = None
    images: tuple[str, ...] = ()

    @property
    def judges_code(self) -> bool:
        return self.tests is not None or self.cases is not None

    def identity(self) -> dict[str, Any]:
        """What a dataset id hashes; ids are older than the fields that are left out if empty."""
        late = {name: getattr(self, name) for name in _LATE}
        first = {name: getattr(self, name) for name in ("problem", "answer", "solution", "choices")}
        return first | {name: value for name, value in late.items() if value is not None}

    def names(self) -> list[str]:
        """Names of the columns that are read as text, without duplicates."""
        choices = self.choices if isinstance(self.choices, list) else [self.choices]
        about = [getattr(self, name) for name in ("id", "subject", "level", *_JUDGING, "messages")]
        names = [self.problem, self.answer, self.solution, *choices, *about]
        for template in filter(None, (self.template, self.answer_template)):
            names += sorted(template_fields(template))
        return list(dict.fromkeys(filter(None, names)))


def shown(columns: dict[str, Any]) -> dict[str, str]:
    """A map's identity for people: roles with their columns, without empty ones."""
    found = {
        role: ", ".join(name) if isinstance(name, list) else name
        for role, name in columns.items()
        if name and role != "final"
    }
    how = {"hashes": " (after ####)", "solution": " (in \\boxed{} or after ####)"}
    answer = columns["answer"] or columns.get("answer_template")
    if not answer:
        return found
    return found | {"answer": f"{answer}{how.get(columns.get('final', ''), '')}"}


def root(name: str, present: Iterable[str]) -> str:
    """The top-level column of a name, which may have a dot of its own."""
    return name if name in present else name.partition(".")[0]


def resolve(found: Found, columns: Columns, where: str) -> ColumnMap:
    """The map of a table: the configured columns, and for the other roles the recognised ones.

    Raises:
        InputError: a configured column is missing, no column is recognised for the problem or the
            answer, or several are.
    """
    fields = _template_columns(columns.template, found, where)
    messages = _named("messages", found, columns, where)
    problem = "" if fields or messages else _column("problem", found, columns, where)
    solution = _column("solution", found, columns, where)
    choices = _choices(found, columns, where)
    shown = _template_columns(columns.answer_template, found, where)
    answer = "" if shown else _column("answer", found, columns, where)
    if shown and isinstance(choices, str):
        raise InputError(
            f"{where}: column {choices!r} holds all choices, of which the answer names one; set "
            "source.columns.answer to its column instead of answer_template, or choices to ''"
        )
    if answer is None and choices is not None:
        answer = _first(found.names, _CHOICE_ANSWERS)
    if problem is None:
        raise _unknown("problem", found, where)
    judging = {role: _named(role, found, columns, where) for role in _JUDGING}
    given = judging["tests"] or judging["cases"]
    if answer is None and not given and set(_CODE.values()) <= set(found.names):
        judging = {role: name or _CODE.get(role) for role, name in judging.items()}
    code = judging["tests"] or judging["cases"]
    if code and solution is None and columns.solution is None:
        solution = _first(found.names, [_CODE_ABOUT["solution"]])
    final = None
    if answer is None and code:
        answer = ""
    elif answer is None and solution is None and messages:
        answer = solution = messages  # the last turn
        final = "solution"
    elif answer is None:
        answer, final = solution, "solution"
    if answer is None:
        raise _unknown("answer", found, where)
    if answer in fields or fields & shown:
        raise InputError(
            f"{where}: source.columns.template shows the answer's column "
            f"{answer or min(fields & shown)!r} to the student; leave it out, or set "
            "source.columns.answer to another column"
        )
    if solution in fields and columns.solution is None:
        solution = None  # its name alone made it one
    if final is None and answer in found.hashed:
        final = "hashes"
        if solution is None and columns.solution is None:
            solution = answer
    used = {problem, solution, answer, messages, *fields, *shown}
    about = [_about(role, found, columns, where, used) for role in KNOWN_ABOUT]
    if code and columns.id is None:
        about[0] = about[0] or _first(found.names, [_CODE_ABOUT["id"]])
    return ColumnMap(
        problem,
        answer,
        solution,
        choices,
        *about,
        final=final,
        **judging,
        template=columns.template,
        answer_template=columns.answer_template,
        messages=messages,
        images=tuple(sorted(found.images)),
    )


def _template_columns(template: str | None, found: Found, where: str) -> set[str]:
    """The columns that a template names; empty without one."""
    return {_required(name, found, where) for name in template_fields(template or "")}


def _column(role: str, found: Found, columns: Columns, where: str) -> str | None:
    named = getattr(columns, role)
    if named is not None:
        return _required(named, found, where) if named else None
    own, *others = KNOWN[role]
    if own in found.names:
        return own
    for known in ([own], others):
        held = [name for name in found.names if plain(name) in known]
        if len(held) > 1:
            raise InputError(
                f"{where}: columns {' and '.join(held)} may both hold the {role}; set "
                f"source.columns.{role} to one of them"
            )
        if held:
            return held[0]
    return None


def _named(role: str, found: Found, columns: Columns, where: str) -> str | None:
    """A configured column of a role that no name tells."""
    named = getattr(columns, role)
    return _required(named, found, where) if named else None


def _choices(found: Found, columns: Columns, where: str) -> list[str] | str | None:
    if columns.choices is not None:
        named = [columns.choices] if isinstance(columns.choices, str) else columns.choices
        for name in filter(None, named):
            _required(name, found, where)
        return columns.choices or None
    lists = [n for n in found.names if n in found.lists and plain(n) in _CHOICE_LISTS]
    if lists:
        return lists[0]
    wrong = [n for n in found.names if plain(n).rstrip("_0123456789") in _WRONG_CHOICES]
    return wrong or None


def _about(
    role: str, found: Found, columns: Columns, where: str, used: set[str | None]
) -> str | None:
    named = getattr(columns, role)
    if named is not None:
        return _required(named, found, where) if named else None
    free = [name for name in found.names if name not in found.lists and name not in used]
    return _first(free, KNOWN_ABOUT[role])


def _first(names: Iterable[str], known: Iterable[str]) -> str | None:
    by_plain = {plain(name): name for name in reversed(list(names))}
    return next((by_plain[name] for name in known if name in by_plain), None)


def cell(foreign: dict[str, Any], name: str) -> Any:
    """The value of a column, or at a dotted name in nested ones; None if there is none."""
    if name in foreign:
        return foreign[name]
    value: Any = foreign
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def plain(name: str) -> str:
    """A name as it is compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _required(name: str, found: Found, where: str) -> str:
    if name not in found.names:
        raise InputError(
            f"{where}: column {name!r} is missing; set source.columns to names out of "
            f"{_listed(found)}"
        )
    return name


def _unknown(role: str, found: Found, where: str) -> InputError:
    return InputError(
        f"{where}: no column is known to hold the {role} (names such as "
        f"{', '.join(KNOWN[role][:4])}); set source.columns.{role} to one of {_listed(found)}"
    )


def _listed(found: Found) -> str:
    text = ", ".join(found.names) or "no column at all"
    return text if len(text) <= 300 else text[:300] + "…"
