"""Verdicts of a reward of one's own (`verify.reward.engine=file.py:function`, see own_reward.py).

`open_verifier` opens it for stage verify, for online training and for evaluations.
"""

import json
from typing import Any

import pyarrow as pa

from ...schemas.configs import OwnReward, VerifyConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, FinishReason, VerdictStatus
from ...schemas.own_code import short_name
from ...schemas.tables import VERDICTS
from .own_reward import reward_function
from .pool import Job, Outcome, VerifierPool, WorkerJudge
from .reading import choice_letter, final_answer
from .verdicts import JUDGED_COLUMNS

_WHERE = "reward.engine"
_ABOUT_PROBLEM = ("problem_id", "source", "split", "answer_kind", "solution", "steps")
_ABOUT_ROLLOUT = ("rollout_id", "group_id", "finish_reason")


def own_identity(reward: OwnReward) -> str:
    """As `reward_identity`, of `verify.reward`."""
    return reward_identity(reward, _WHERE)


def reward_identity(reward: OwnReward, where: str) -> str:
    """What dataset ids hash in place of a verifier's version. where: the config's field.

    Raises:
        InputError: no such function, or one that does not take its options.
    """
    code = reward.load(where)
    reward_function(code, reward.options)
    return f"{short_name(reward.engine)} {code.sha256[:16]}"


def worker_judge(reward: OwnReward, where: str) -> WorkerJudge:
    """The judge of a pool's workers. where: the config's field."""
    return WorkerJudge(
        "own_reward",
        json.dumps([where, reward.model_dump(mode="json")]),
        f"{where} {reward.engine}",
        "run less when the file is imported, or raise verify.memory_mib",
    )


def reward_job(rollout: dict[str, Any], problem: dict[str, Any]) -> Job:
    """The arguments of the function."""
    metadata = {name: problem[name] for name in _ABOUT_PROBLEM}
    metadata |= {name: rollout[name] for name in _ABOUT_ROLLOUT}
    if problem.get("history"):
        metadata["history"] = problem["history"]
    if problem.get("metadata") is not None:
        metadata["metadata"] = json.loads(problem["metadata"])
    texts = problem["problem"], rollout["response"], problem["answer"]
    return Job(*texts, json.dumps(metadata))


class OwnRewards:
    """Rewards rollouts (trace.protocols.Verifier); holds worker processes until closed.

    A truncated response is not shown to the function: it has reward 0, or none with
    `truncated="mask"`, as under the reward `answer`.
    """

    def __init__(self, config: VerifyConfig, reward: OwnReward) -> None:
        self._config = config
        self._name = own_identity(reward)
        self._pool = VerifierPool(
            config.workers,
            config.timeout_s,
            config.memory_mib,
            config.recycle_every,
            worker_judge(reward, _WHERE),
        )

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        """One verdicts row per rollout, in order.

        problems: all columns; rollouts: columns `JUDGED_COLUMNS`.

        Raises:
            InputError: a rollout's problem is not among the problems.
        """
        by_id = {row["problem_id"]: row for row in problems.to_pylist()}
        rows = rollouts.select(JUDGED_COLUMNS).to_pylist()
        for index, row in enumerate(rows):
            if row["problem_id"] not in by_id:
                raise InputError(
                    f"rollouts, row {index}: problem {row['problem_id']} is not among the "
                    "problems; verify rollouts with the problems that they were sampled for"
                )
        ended = [row for row in rows if row["finish_reason"] != FinishReason.LENGTH]
        jobs = [reward_job(row, by_id[row["problem_id"]]) for row in ended]
        outcomes = iter(self._pool.judge(jobs))
        truncated = Outcome(VerdictStatus.TRUNCATED, False, 0.0, 0.0)
        if self._config.truncated == "mask":
            truncated = Outcome(VerdictStatus.TRUNCATED, None, 0.0)
        judged = [
            self._row(
                row,
                AnswerKind(by_id[row["problem_id"]]["answer_kind"]),
                truncated if row["finish_reason"] == FinishReason.LENGTH else next(outcomes),
            )
            for row in rows
        ]
        return pa.Table.from_pylist(judged, schema=VERDICTS.schema_of({"feedback"}))

    def close(self) -> None:
        self._pool.close()

    def _row(self, rollout: dict[str, Any], kind: AnswerKind, outcome: Outcome) -> dict[str, Any]:
        correct = outcome.correct
        if correct is None and outcome.reward is not None:
            correct = outcome.reward == 1
        read = choice_letter if kind == AnswerKind.CHOICE else final_answer
        return {
            "rollout_id": rollout["rollout_id"],
            "problem_id": rollout["problem_id"],
            "group_id": rollout["group_id"],
            "reward": outcome.reward,
            "correct": correct,
            "parsed_answer": read(rollout["response"]),
            "status": outcome.status,
            "verifier": self._name,
            "seconds": outcome.seconds,
            "feedback": outcome.feedback,
        }
