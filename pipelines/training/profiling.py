"""A profile of one training step (`train.profile_step`) for Perfetto or chrome://tracing.

loop.py takes its steps through `profiled`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile

from ...data.atomic import writing
from ...trace.trainer import Metrics, Trainer

logger = logging.getLogger(__name__)


def profiled(steps: Iterator[Metrics], trainer: Trainer, folder: Path) -> Iterator[Metrics]:
    """The trainer's steps; the first rank records the one of `train.profile_step`.

    The trace holds the operations of the trainer's thread, all kernels of this process on CUDA, and
    the step's phases as ranges (clock.py). A step that is stopped leaves no trace.

    Raises InputError if the trace can't be written.
    """
    wanted = trainer.config.profile_step if trainer.ranks.first else None
    while True:
        step = trainer.state.step
        if step != wanted:
            metrics = next(steps, None)
        else:
            with profile() as recorded:
                metrics = next(steps, None)
            path = folder / f"profile-step-{step}.json.gz"
            with writing(path):
                recorded.export_chrome_trace(str(path))
            logger.info("step %d: its profile is in %s", step, path)
        if metrics is None:
            return
        yield metrics
