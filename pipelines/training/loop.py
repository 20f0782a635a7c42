"""The loop over a training's steps: metrics, validation, checkpoints, and an orderly end on Ctrl-C
and SIGTERM.

Stage train calls `train_steps` on every rank.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress

from ...data.store import Draft
from ...schemas.configs import TrainConfig
from ...schemas.errors import Collapsed, EngineEnded, InputError, Interrupted, Stopped
from ...trace.checkpoint import CheckpointWriter
from ...trace.trainer import Metrics, OfflineSource, Online, Trainer
from ..progress import Meter
from ..runtime.signals import announce, handled, stop_of
from .collapse import CollapseGuard, method_name
from .completions import SeenTables
from .profiling import profiled
from .tracking import Tracker
from .validation import BASE_EVALUATIONS, Validation


def train_steps(
    trainer: Trainer,
    target: Draft,
    offline: OfflineSource | None,
    online: Online | None,
    validation: Validation | None,
    progress: Meter,
) -> None:
    """All remaining steps of a training, from the trainer's current state.

    Raises:
        Stopped, Interrupted: SIGTERM or Ctrl-C; a checkpoint of the last finished step is on disk.
        Collapsed: the policy did, and stop_on_collapse is set; such a checkpoint is on disk.
        EngineEnded: a sampler's engine died; on one rank such a checkpoint is on disk too.
    """
    config = trainer.config
    folder = target.local_path("checkpoints")
    writer = CheckpointWriter(trainer, folder, config.checkpoints_kept)
    saved, saved_at = trainer.state.step, time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        writer.save()
        saved, saved_at = trainer.state.step, time.monotonic()

    def due() -> bool:
        now = [(time.monotonic() - saved_at) / 60, float(writer.failed)]
        if trainer.ranks.count > 1:  # their clocks differ, and a checkpoint takes all of them
            now = trainer.ranks.most(now)
        minutes, failed = now
        # One that could not be written is due: `save` raises its error on every rank.
        return bool(failed) or checkpoint_due(config, trainer.state.step, minutes)

    with (
        _stop_request(trainer) as stopping,
        _tracker(trainer, target) as tracker,
        _written(writer),
    ):
        progress.resume(trainer.state.step)
        try:
            if validation is not None and trainer.state.step == 0:
                base = trainer.policy.info.revision
                validation.evaluate_base(base, target.files.local_path(BASE_EVALUATIONS))
            guard = CollapseGuard(config, target.local_path(), trainer.state.step, trainer.ranks)
            seen = SeenTables(offline, online, config.completions_every)
            steps = trainer.run(seen, seen, lambda: bool(stopping()))
            for metrics in profiled(steps, trainer, target.local_path()):
                done = trainer.state.step
                if validation is not None and validation.due(done, trainer.total_steps):
                    metrics |= validation.evaluate(done)
                guard.observe(metrics)
                if tracker is not None:
                    rows = seen.rows(trainer.policy.tokenizer)
                    tracker.log(metrics, guard.figures(done), rows)
                guard.stop_after(metrics)
                if due():
                    save()
                progress.advance(1, **_shown(metrics), checkpoint=writer.written)
        except (Stopped, Interrupted, Collapsed, EngineEnded) as ended:
            engine = isinstance(ended, EngineEnded)
            if engine and trainer.ranks.count > 1:
                raise  # on one rank only, and a checkpoint takes all of them
            if saved != trainer.state.step:
                save()
            writer.wait()
            # Torchrun kills all ranks 30 s after one has ended, and the first may still write.
            trainer.ranks.wait()
            if isinstance(ended, Collapsed):
                raise
            if engine and not stopping():  # a signal to all processes of a run ends its engine too
                raise
            raise stop_of(
                stopping(),
                f"stopped after {trainer.state.step} of {trainer.total_steps} steps; a checkpoint "
                "is written",
            ) from None


@contextmanager
def _written(writer: CheckpointWriter) -> Iterator[None]:
    """Waits for the checkpoint that is being written, also when the run ends with an error."""
    try:
        yield
    except KeyboardInterrupt:  # the second Ctrl-C
        raise
    except BaseException:
        with suppress(InputError):  # the first error is the one to report
            writer.wait()
        raise
    writer.wait()


def checkpoint_due(config: TrainConfig, done: int, minutes: float) -> bool:
    """Whether to write a checkpoint after so many steps. minutes: since the last one."""
    if done == config.offline.steps + config.online.steps or done % config.checkpoint_every == 0:
        return True
    return config.checkpoint_minutes is not None and minutes >= config.checkpoint_minutes


def _shown(metrics: Metrics) -> dict[str, str]:
    """The figures of a step that a progress bar shows."""
    formats = {
        "loss": ("loss", "{:.3g}"),
        "reward": ("reward", "{:.2f}"),
        "kl_weight": ("kl", "{:.2f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "mfu": ("MFU", "{:.0%}"),
    }
    return {
        label: form.format(metrics[name])
        for name, (label, form) in formats.items()
        if name in metrics
    }


@contextmanager
def _stop_request(trainer: Trainer) -> Iterator[Callable[[], int]]:
    """The number of the signal that any rank has received, 0 without one."""
    received: list[int] = []

    def receive(number: int) -> None:
        if not received and number == signal.SIGINT and trainer.ranks.first:
            again = ", Ctrl-C again to stop without it" if trainer.ranks.count == 1 else ""
            announce(f"writing a checkpoint{again}")
        received.append(number)
        # Torchrun passes the terminal's Ctrl-C on: its ranks get it twice.
        if received[1:].count(signal.SIGINT) and trainer.ranks.count == 1:
            raise KeyboardInterrupt

    def stopping() -> int:
        number = received[0] if received else 0
        if trainer.ranks.count == 1:
            return number
        return int(trainer.ranks.most([float(number)])[0])

    with handled(receive):
        yield stopping


def _tracker(trainer: Trainer, target: Draft) -> AbstractContextManager[Tracker | None]:
    """Logs the first rank's metrics; the other ranks' are the same."""
    if not trainer.ranks.first:
        return nullcontext()
    config, folder = trainer.config, target.local_path()
    settings = config.model_dump(mode="json")
    inputs = target.header["inputs"]
    facts = {"dataset": target.ref, "preset": method_name(config), "inputs": inputs}
    return closing(Tracker(folder, trainer.state.step, config.tracker, target.ref, settings, facts))
