"""The base policy of a world: pre-trained once per machine, then found. Studies call `base_of`."""

import logging
from functools import partial
from pathlib import Path

from ...data.store import content_hash
from ...schemas.configs import WorldConfig
from ...schemas.environment import cache_folder
from .demonstrations import Mixture
from .micro import pretrain
from .prepared import prepared

logger = logging.getLogger(__name__)

_VERSION = 1  # raised when the same dials make another base


def base_of(world: WorldConfig, folder: Path | None = None) -> Path:
    """The folder of the world's base, a policy like micro. folder: of all bases; None: the cache.

    Raises:
        InputError: the folder can't be written.
    """
    name = content_hash({"version": _VERSION, "world": world.model_dump(mode="json")}, length=16)
    return prepared((folder or cache_folder("worlds")) / name, partial(_pretrain, world))


def _pretrain(world: WorldConfig, output: Path) -> None:
    logger.info("pre-training the base of a world in %d steps, once", world.steps)
    pretrain(output, world.steps, world.batch_size, world.lr, world.seed, (), Mixture(world=world))
