"""A part that is a function of one's own, in killable workers (own_reward.py is its manual)."""

from ....schemas.configs import OwnPart, OwnReward, VerifyConfig
from ..own import reward_identity, reward_job, worker_judge
from ..pool import VerifierPool
from .part import Batch, Values

_WHERE = "rewards"


def identity(part: OwnPart) -> str:
    return reward_identity(_reward(part), _WHERE)


def _reward(part: OwnPart) -> OwnReward:
    return OwnReward(engine=part.name, options=part.options, sha256=part.sha256)


class Own:
    def __init__(self, part: OwnPart, config: VerifyConfig) -> None:
        identity(part)  # the function is there and takes its options
        self._pool = VerifierPool(
            config.workers,
            config.timeout_s,
            config.memory_mib,
            config.recycle_every,
            worker_judge(_reward(part), _WHERE),
        )

    def judge(self, batch: Batch) -> Values:
        rollouts = batch.rollouts.to_pylist()
        outcomes = self._pool.judge(
            [reward_job(rollout, batch.problem(row)) for row, rollout in enumerate(rollouts)]
        )
        return Values(
            [one.reward for one in outcomes],
            [one.status for one in outcomes],
            [one.seconds for one in outcomes],
            correct=[one.correct for one in outcomes],
            feedback=[one.feedback for one in outcomes],
        )

    def close(self) -> None:
        self._pool.close()
