"""The loop over a training's steps: metrics, validation, checkpoints, and an orderly end on
SIGTERM.

Stage train calls `train_steps` on every rank.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

from ...data.store import Draft
from ...schemas.errors import EngineEnded, Stopped
from ...trace.checkpoint import save_checkpoint
from ...trace.trainer import OfflineSource, Online, Trainer
from .tracking import Tracker
from .validation import BASE_EVALUATIONS, Validation


def train_steps(
    trainer: Trainer,
    target: Draft,
    offline: OfflineSource | None,
    online: Online | None,
    validation: Validation | None,
    advance: Callable[..., None],
) -> None:
    """All remaining steps of a training, from the trainer's current state.

    advance: takes a number of steps done, and figures to show with them.

    Raises:
        Stopped: SIGTERM was received; a checkpoint of the last finished step is on disk.
        EngineEnded: a sampler's engine died; on one rank such a checkpoint is on disk too.
    """
    config = trainer.config
    checkpoints = target.local_path("checkpoints")
    saved = trainer.state.step

    def save() -> int:
        save_checkpoint(trainer, checkpoints, config.checkpoints_kept)
        return trainer.state.step

    with _stop_request(trainer) as stopping, _tracker(trainer, target) as tracker:
        advance(trainer.state.step)
        try:
            if validation is not None and trainer.state.step == 0:
                base = trainer.policy.info.revision
                validation.evaluate_base(base, target.files.local_path(BASE_EVALUATIONS))
            for metrics in trainer.run(offline, online, stopping):
                done = trainer.state.step
                if validation is not None and validation.due(done, trainer.total_steps):
                    metrics |= validation.evaluate(done)
                if tracker is not None:
                    tracker.log(metrics)
                reward = f"{metrics['reward']:.2f}" if "reward" in metrics else "–"
                advance(1, reward=reward, kl=f"{metrics['kl_weight']:.2f}")
                if done == trainer.total_steps or done % config.checkpoint_every == 0:
                    saved = save()
        except (Stopped, EngineEnded) as ended:
            engine = isinstance(ended, EngineEnded)
            if engine and trainer.ranks.count > 1:
                raise  # on one rank only, and a checkpoint takes all of them
            if saved != trainer.state.step:
                save()
            if engine and not stopping():  # a signal to all processes of a run ends its engine too
                raise
            raise Stopped(
                f"stopped after {trainer.state.step} of {trainer.total_steps} steps; the same "
                "command goes on from there"
            ) from None


@contextmanager
def _stop_request(trainer: Trainer) -> Iterator[Callable[[], bool]]:
    """Whether any rank has received SIGTERM. Only a main thread can handle signals."""
    received: list[int] = []

    def stopping() -> bool:
        if trainer.ranks.count == 1:
            return bool(received)
        return trainer.ranks.most([float(bool(received))], trainer.policy.device)[0] > 0

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


def _tracker(trainer: Trainer, target: Draft) -> AbstractContextManager[Tracker | None]:
    """Logs the first rank's metrics; the other ranks' are the same."""
    if not trainer.ranks.first:
        return nullcontext()
    config, folder = trainer.config, target.local_path()
    settings = config.model_dump(mode="json")
    return closing(Tracker(folder, trainer.state.step, config.tracker, target.ref, settings))
