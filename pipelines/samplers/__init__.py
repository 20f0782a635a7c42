"""Sampling engines by config tag.

Stages, online training, own-policy annotation and the training plan call `sampling_engine`. What an
engine answers is in engine.py. To add one: a config class with its tag in schemas/configs, a file
named after the tag here, and an entry in `_ENGINES`.
"""

from collections.abc import Callable
from typing import Any

from ...schemas.configs import PolicyConfig, Sampler
from .engine import Engine


def sampling_engine(config: Sampler, policy: PolicyConfig) -> Engine:
    """The engine of a config, for a policy; nothing is opened or checked yet."""
    return _ENGINES[config.engine]()(config, policy)


# Imports wait until an engine is used: each has heavy packages of its own.


def _transformers() -> Callable[[Any, PolicyConfig], Engine]:
    from .transformers import TransformersEngine

    return TransformersEngine


def _openai() -> Callable[[Any, PolicyConfig], Engine]:
    from .openai import OpenAIEngine

    return OpenAIEngine


def _vllm() -> Callable[[Any, PolicyConfig], Engine]:
    from .vllm import VllmEngine

    return VllmEngine


_ENGINES = {"transformers": _transformers, "openai": _openai, "vllm": _vllm}
