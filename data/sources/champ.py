"""CHAMP: competition problems with step-by-step reference solutions (package champ-dataset).

The source of kind `champ`, called through `sources.rows` by stage problems.
"""

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import champ_dataset

from ...schemas.configs import ChampSource
from ...schemas.labels import AnswerKind

_EVALUATED = re.compile(r"^.*, or equivalently ")
_ASIDE = re.compile(r" \((?:i\.e\., |none of ).*\)$|, or (?:approximately|an equivalent form) .*$")


def rows(source: ChampSource, seed: int) -> Iterator[dict[str, Any]]:
    """All problems in the package's order; `seed` has no effect."""
    for problem in champ_dataset.load("v0").problems.values():
        yield {
            "problem": problem.text.strip(),
            "answer": gold_answer(problem.answer),
            "answer_kind": AnswerKind.MATH,
            "solution": "\n".join(step.text for step in problem.solution.steps),
            "steps": None,
            "source": "champ",
        }


def identity(source: ChampSource) -> dict[str, Any]:
    return source.semantic() | {"champ-dataset": version("champ-dataset")}


def gold_answer(text: str) -> str:
    """One form to compare: 252 for "C(10, 5), or equivalently 252", 0 for "0 (i.e., none)"."""
    return _ASIDE.sub("", _EVALUATED.sub("", text)).strip()
