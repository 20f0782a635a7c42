"""reasoning-gym's scores, inside a verification worker.

worker.py calls `judge_by`; rewards/gym.py makes the jobs. A task's scorer may evaluate the answer
(a formula, a program of the task's own language), so it runs under the worker's limits.
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import reasoning_gym

from ...schemas.labels import VerdictStatus

# Status, correct, what went wrong, reward, feedback.
Judgement = tuple[VerdictStatus, bool | None, str, float | None, str | None]


def judge_by(_: str) -> Callable[..., Judgement]:
    """The judge of a worker: it scores an answer by a problem's metadata, JSON texts both."""
    return _judge


def _judge(answer: str, metadata: str) -> Judgement:
    """answer: JSON of text or null."""
    about = json.loads(metadata)["gym"]
    try:
        place = about["task"], json.dumps(about["settings"]), about["seed"], about["size"]
        entry = about["entry"] or _entry(*place, about["index"])
        score = float(_task(*place).score_answer(json.loads(answer), entry))
    except MemoryError:
        return VerdictStatus.OOM, None, "", None, None
    except Exception as error:  # of a scorer on an odd answer: a row, not a crash
        what = f"task {about['task']}: {type(error).__name__}: {str(error)[:200]}"
        return VerdictStatus.ERROR, None, what, None, None
    if not math.isfinite(score):
        return VerdictStatus.ERROR, None, f"task {about['task']}: score {score}", None, None
    return VerdictStatus.OK, None, "", min(max(score, 0.0), 1.0), None


@lru_cache(maxsize=16)  # problems of a task follow each other
def _task(name: str, settings: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(settings))


@lru_cache(maxsize=16)  # the responses to a problem follow each other
def _entry(name: str, settings: str, seed: int, size: int, index: int) -> Any:
    return _task(name, settings, seed, size)[index]
