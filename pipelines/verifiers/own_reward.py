"""A reward of your own, inside a verification worker. `RewardFunction` below is its manual.

worker.py calls `judge_by`, own.py checks the function before the workers start.
examples/own-code/reward.py is a worked example.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, Protocol

from ...schemas.configs import OwnReward
from ...schemas.errors import InputError
from ...schemas.labels import VerdictStatus
from ...schemas.own_code import OwnCode, build, failure, is_text

ARGUMENTS = ("problem", "response", "answer", "metadata")
_MOST_FEEDBACK_CHARS = 10_000

# Status, correct, what went wrong, reward, feedback.
Judgement = tuple[VerdictStatus, bool | None, str, float | None, str | None]


class RewardFunction(Protocol):
    """Rewards a response: `verify.reward.engine=file.py:function`, or a part of `verify.rewards`
    with that name.

    Arguments are passed by name, and only those that the function takes; `reward.options` become
    further keyword arguments.

    problem, response: texts; answer: the gold answer of table problems, whatever it means to the
    function (answer_kind text is not parsed); metadata: problem_id, group_id, rollout_id, source,
    split, answer_kind, solution and steps of the problem, finish_reason; and metadata, a dict, and
    history, the turns before the problem, of a problem that has them.

    Returns a bool; a number in 0 … 1, which counts as correct at 1 (in
    `verify.rewards` at `verify.correct_at`); or a dict of `reward`,
    `correct` and `feedback` (text that is kept in table verdicts), where either of the first two
    follows from the other.

    A class is built with `options` as other code of one's own is, and its instance is called.

    It runs in worker processes with `verify.timeout_s` per response and `verify.memory_mib` of
    address space. A response on which it raises, returns anything else, or exceeds a limit has no
    reward, and only that one. What it prints is discarded.
    """

    def __call__(
        self, problem: str, response: str, answer: str, metadata: dict[str, Any]
    ) -> Any: ...


def reward_function(code: OwnCode, options: dict[str, Any]) -> Callable[..., Any]:
    """The function with its options, called by keyword with `ARGUMENTS`.

    Raises:
        InputError: it does not take its options, or needs other arguments.
    """
    if isinstance(code.value, type):
        called, options = build(code, options), {}
        if not callable(called):
            raise InputError(f"{code.label}: has no method __call__(problem, response, …)")
    else:
        called = code.value
    parameters = inspect.signature(called).parameters
    free = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if clash := options.keys() & set(ARGUMENTS):
        raise InputError(f"{code.label}: options.{min(clash)} is an argument of every reward")
    taken = ARGUMENTS if free else [name for name in ARGUMENTS if name in parameters]
    try:
        inspect.signature(called).bind(**dict.fromkeys(taken), **options)
    except TypeError as error:
        raise InputError(
            f"{code.label}: {error}; a reward takes {', '.join(ARGUMENTS)} and reward.options, by "
            "name"
        ) from None
    return lambda **given: called(**{name: given[name] for name in taken}, **options)


def judge_by(config: str) -> Callable[..., Judgement]:
    """The judge of a worker. config: where the run's config names it, and `OwnReward`, as JSON.

    Raises:
        InputError: the file cannot be imported, or has changed.
    """
    where, reward = json.loads(config)
    own = OwnReward.model_validate(reward)
    code = own.load(where)
    function = reward_function(code, own.options)

    def judge(problem: str, response: str, answer: str, metadata: str) -> Judgement:
        try:
            given = {"problem": problem, "response": response, "answer": answer}
            reward, correct, feedback = _read(function(**given, metadata=json.loads(metadata)))
        except MemoryError:
            return VerdictStatus.OOM, None, "", None, None
        except BaseException as error:  # SystemExit too: a row, not the end of the worker
            return VerdictStatus.ERROR, None, failure(error, code.file), None, None
        return VerdictStatus.OK, correct, "", reward, feedback

    return judge


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's."""
    return value.item() if hasattr(value, "item") else value


def _read(returned: Any) -> tuple[float, bool | None, str | None]:
    """Reward, whether it is correct if that was returned, and feedback. Raises TypeError or
    ValueError.
    """
    parts = returned if isinstance(returned, dict) else {"reward": returned}
    if unknown := parts.keys() - {"reward", "correct", "feedback"}:
        raise ValueError(f"returned the unknown key {min(map(str, unknown))!r}")
    reward, correct, feedback = (parts.get(name) for name in ("reward", "correct", "feedback"))
    reward, correct = (_scalar(one) for one in (reward, correct))
    if not isinstance(correct, bool | None):
        raise TypeError(f"returned correct={correct!r:.80}, not a bool")
    reward = correct if reward is None else reward
    if not isinstance(reward, bool | int | float):
        raise TypeError(f"returned {returned!r:.80}, not a bool, a number in 0 … 1, or a dict")
    if feedback is not None and not is_text(feedback):
        raise TypeError(f"returned feedback={feedback!r:.80}, not text")
    reward = float(reward)
    if not 0 <= reward <= 1:
        raise ValueError(f"returned the reward {reward}, which is not in 0 … 1")
    return reward, correct, None if feedback is None else feedback[:_MOST_FEEDBACK_CHARS]
