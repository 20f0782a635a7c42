"""Sampling engines: a registry from a config's tag to the file of its engine.

Stages, online training, own-policy annotation and the training plan call `sampling_engine`;
engine.py
says what an engine answers. To add one: a config class with its tag in schemas/configs, and a file
here named after the tag that exports `ENGINE`. It is imported when a config names it, because each
needs other packages. own.py is the engine of classes that a config names as `file.py:Class`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ...schemas.configs import PolicyConfig, Sampler
from ...schemas.own_code import is_own

if TYPE_CHECKING:  # convert's checks start without torch
    from .engine import Engine


def sampling_engine(config: Sampler, policy: PolicyConfig) -> "Engine":
    """The engine of a config, for a policy; nothing is opened or checked yet."""
    file = "own" if is_own(config.engine) else config.engine
    return import_module(f".{file}", __name__).ENGINE(config, policy)
