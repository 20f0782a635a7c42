"""Removal of the checkpoints that a finished run does not need. Stage train calls `tidy`."""

import logging
from contextlib import nullcontext

from ...data.store import Dataset
from ...schemas.configs import TrainConfig
from ...schemas.errors import InputError
from ...trace.retention import remove_checkpoint, unneeded_checkpoints
from ..stages.base import print_waiting

logger = logging.getLogger(__name__)


def tidy(run: Dataset, config: TrainConfig, locked: bool) -> None:
    """Remove a finished run's checkpoints, unless its config keeps them.

    Also called where the run is found finished: a run may be killed after its manifest and before
    it has removed them. locked: the caller holds the run's lock. A checkpoint that can't be removed
    stays, with a warning: the run is finished.
    """
    if config.keep_checkpoints or run.manifest["config"].get("keep_checkpoints"):
        return
    try:
        folder = run.files.local_path(f"{run.ref}/checkpoints")
        if not unneeded_checkpoints(folder):  # no lock for nothing: the store may be read-only
            return
        with nullcontext() if locked else run.files.locked(run.ref, print_waiting):
            for checkpoint in unneeded_checkpoints(folder):
                remove_checkpoint(checkpoint)
    except (InputError, OSError) as error:
        logger.warning("%s: not all of its checkpoints could be removed (%s)", run.ref, error)
