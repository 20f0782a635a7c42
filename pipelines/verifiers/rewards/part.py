"""What a part of `verify.rewards` gets and gives.

Each file of this folder implements one class of parts. parts.py combines their values.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa

from ....schemas.labels import VerdictStatus


@dataclass(frozen=True)
class Batch:
    """Responses that ended, with their problems.

    problems: rows of table problems; of: each response's index in them; rollouts: a row per
    response, columns `JUDGED_COLUMNS` and perhaps token_ids.
    """

    problems: list[dict[str, Any]]
    of: list[int]
    rollouts: pa.Table

    @cached_property
    def responses(self) -> list[str]:
        return [str(response) for response in self.rollouts["response"].to_pylist()]

    def problem(self, row: int) -> dict[str, Any]:
        return self.problems[self.of[row]]

    def each(self, name: str) -> list[Any]:
        """A column of problems, one entry per response."""
        column = [problem.get(name) for problem in self.problems]
        return [column[index] for index in self.of]


@dataclass
class Values:
    """A part's results, one entry per response.

    values: 0 … 1, None where the part has none; status: why; seconds: wall clock; answers: what was
    read from the response; correct: the part's own judgement, None where the threshold decides;
    feedback: text; grades: of a judge, the entries of column `grades`.
    """

    values: list[float | None]
    status: list[VerdictStatus]
    seconds: list[float] = field(default_factory=list)
    answers: list[str | None] | None = None
    correct: list[bool | None] | None = None
    feedback: list[str | None] | None = None
    grades: list[list[dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        self.seconds = self.seconds or [0.0] * len(self.values)


class Part(Protocol):
    """Values responses; may hold processes until it is closed."""

    def judge(self, batch: Batch) -> Values: ...

    def close(self) -> None: ...


class InProcess:
    """A part without processes."""

    def close(self) -> None:
        """Nothing is open."""


def decided(values: list[float]) -> Values:
    """Values of a part that has one for every response."""
    return Values(list(values), [VerdictStatus.OK] * len(values))
