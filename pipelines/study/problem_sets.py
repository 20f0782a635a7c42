"""The problem sets of a study, made anew for each number of digits that its worlds ask.

study.py calls `problem_sets`; arms.py links each arm to the sets of its world.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ...data.store import Dataset, Store
from ...schemas.configs import ArithmeticSource, ProblemsConfig, StudyConfig
from ...schemas.errors import InputError
from ...schemas.settings import overlaid
from ..pipeline import run_stage


@dataclass(frozen=True)
class ProblemSets:
    """Refs: of the training problems; of what tuning evaluates, {} without; of each split."""

    problems: str
    tuning: dict[str, str]
    splits: dict[str, str]


def sources(config: StudyConfig, digits: int | None) -> dict[str, ProblemsConfig]:
    """Problems by role (`problems`, `tuning`, each split) of worlds that ask so many digits.

    Raises:
        InputError: a source that has no digits.
    """
    tuning = {} if config.tuning is None else {"tuning": config.tuning.problems}
    found = {"problems": config.problems, **tuning, **config.splits}
    if digits is None:
        return found
    for role, source in found.items():
        if not isinstance(source.source, ArithmeticSource):
            where = role if role == "problems" else f"{role}.problems"
            where = f"splits.{role}" if role in config.splits else where
            raise InputError(
                f"{where}.source: a world has asked_digits {digits}, which only a source of kind "
                "arithmetic can ask; give such a source or leave asked_digits out"
            )
    asked = {"source": {"min_digits": digits, "max_digits": digits}}
    return {role: overlaid(source, asked, []) for role, source in found.items()}


def problem_sets(
    config: StudyConfig, store: Store, asked: Iterable[int | None]
) -> dict[int | None, ProblemSets]:
    """The sets by number of digits; None: as the study's problems say.

    Raises:
        InputError: see `sources`, and stage problems.
    """
    return {digits: _made(config, store, digits) for digits in asked}


def _made(config: StudyConfig, store: Store, digits: int | None) -> ProblemSets:
    suffix = "" if digits is None else f"-{digits}-digits"
    refs = {}
    for role, source in sources(config, digits).items():
        made = run_stage("problems", source, store, f"{config.name}-{role}{suffix}")
        assert isinstance(made, Dataset), "only a report is a file"
        refs[role] = made.ref
    problems = refs.pop("problems")
    tuning = {"tuning": refs.pop("tuning")} if config.tuning is not None else {}
    return ProblemSets(problems, tuning, refs)
