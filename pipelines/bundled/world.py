"""The base policy of a world: pre-trained once per machine, then found. Studies call `base_of`."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from ...data.store import content_hash
from ...schemas.configs import WorldConfig
from ...schemas.environment import cache_folder
from ...trace.identity import model_revision
from ..annotators.prompting import AnnotationPrompt, load_prompt
from ..models import resolve_policy
from .demonstrations import Mixture
from .micro import pretrain
from .prepared import prepared

logger = logging.getLogger(__name__)

_VERSION = 2  # raised when the same dials make another base


def base_of(world: WorldConfig, folder: Path | None = None) -> Path:
    """The folder of the world's base, a policy like micro. folder: of all bases; None: the cache.

    Raises:
        InputError: the folder can't be written, no such start, or a start with other tokens; a
            file of the markings can't be read.
    """
    return prepared(base_folder(world, folder), partial(_pretrain, world))


def base_folder(world: WorldConfig, folder: Path | None = None) -> Path:
    """Where the world's base is, or will be.

    Raises:
        InputError: no such start; a file of the markings can't be read.
    """
    name = content_hash({"version": _VERSION, "world": _identity(world)}, length=16)
    return (folder or cache_folder("worlds")) / name


def _identity(world: WorldConfig) -> dict[str, Any]:
    """What decides the base: the dials, with the content of files in place of their paths."""
    dials = world.model_dump(
        mode="json", exclude={"asked_digits", "marking_prompt", "marking_schema"}
    )
    prompt = _marking_prompt(world)
    dials["marking_prompt"] = None if prompt is None else prompt.sha256
    if world.start is not None:
        dials["start"] = model_revision(resolve_policy(world.start))
    return dials


def _marking_prompt(world: WorldConfig) -> AnnotationPrompt | None:
    if not world.marking:
        return None
    return load_prompt(world.marking_prompt, world.marking_schema)


def _pretrain(world: WorldConfig, output: Path) -> None:
    logger.info("pre-training the base of a world in %d steps, once", world.steps)
    mixture = Mixture(world.subtraction, world.marking, _marking_prompt(world), world)
    start = None if world.start is None else resolve_policy(world.start)
    pretrain(output, world.steps, world.batch_size, world.lr, world.seed, (), mixture, start)
