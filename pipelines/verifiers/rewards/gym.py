"""Part `gym`: the score of a reasoning-gym task for the final answer, in killable workers."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ....data.boxed import boxed_answer
from ....schemas.configs import GymPart, VerifyConfig
from ....schemas.errors import InputError
from ....schemas.labels import VerdictStatus
from ..pool import Job, Outcome, VerifierPool, WorkerJudge
from ..reading import final_answer, visible
from .part import Batch, Values

_JUDGE = WorkerJudge("gym_reward", "", "rewards: gym", "raise verify.memory_mib")
_NO_METADATA = Outcome(VerdictStatus.GOLD_UNPARSED, None, 0.0)


def identity(part: GymPart) -> str:
    return f"reasoning-gym {_version()}"


def _version() -> str:
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise InputError(
            "rewards: gym: package reasoning_gym is not installed; "
            "pip install 'trace-opd[pipelines,problems]'"
        ) from None


class Gym:
    def __init__(self, part: GymPart, config: VerifyConfig) -> None:
        _version()
        self._pool = VerifierPool(
            config.workers, config.timeout_s, config.memory_mib, config.recycle_every, _JUDGE
        )

    def judge(self, batch: Batch) -> Values:
        by_problem = [_of_gym(problem) for problem in batch.problems]
        metadata = [by_problem[index] for index in batch.of]
        if not any(by_problem):
            raise InputError(
                "rewards: gym: no problem has reasoning-gym's metadata; make them with "
                "source={kind: reasoning-gym, task: …, scored: true}"
            )
        answers = [_answer(response) for response in batch.responses]
        jobs = [Job(json.dumps(a), m) for a, m in zip(answers, metadata, strict=True) if m]
        judged = iter(self._pool.judge(jobs))
        outcomes = [next(judged) if text else _NO_METADATA for text in metadata]
        return Values(
            [one.reward for one in outcomes],
            [
                VerdictStatus.PRED_UNPARSED
                if answer is None and one.status is VerdictStatus.OK
                else one.status
                for one, answer in zip(outcomes, answers, strict=True)
            ],
            [one.seconds for one in outcomes],
            answers,
        )

    def close(self) -> None:
        self._pool.close()


def _of_gym(problem: dict[str, Any]) -> str | None:
    """The metadata of a reasoning-gym problem; None of another.

    Raises:
        InputError: its entry `gym` is not what source.scored writes.
    """
    metadata = problem.get("metadata")
    found = json.loads(metadata).get("gym") if metadata else None
    if found is None:
        return None
    if not _is_entry(found):
        raise InputError(
            f"rewards: gym: problem {problem['problem_id']}: its metadata's gym is not what the "
            "scorer needs; make the problems with source={kind: reasoning-gym, task: …, scored: "
            "true}"
        )
    return metadata


def _is_entry(found: Any) -> bool:
    """Whether gym_reward.py can read it."""
    if not isinstance(found, dict):
        return False
    for name, least in (("seed", 0), ("size", 1), ("index", 0)):
        value = found.get(name)
        if type(value) is not int or value < least:  # True is no number
            return False
    return (
        isinstance(found.get("task"), str)
        and isinstance(found.get("settings"), dict)
        and "entry" in found
        and isinstance(found["entry"], dict | None)
    )


def _answer(response: str) -> str | None:
    """The last box's content, without the command that sets text; else a final statement."""
    boxed = boxed_answer(visible(response))
    if boxed is None:
        return final_answer(response)
    inner = boxed.strip()
    if inner.startswith("\\text{") and inner.endswith("}"):
        inner = inner.removeprefix("\\text{").removesuffix("}")
    return inner or None
