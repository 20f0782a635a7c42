"""Scoring engines: what a teacher gives the routed tokens. Stage score opens them by name.

Each file exports `ENGINE`: local.py a model on this machine, vllm.py vLLM servers.
"""

from importlib import import_module

from ...schemas.configs import ScoreConfig
from .engine import Engine, Scorer, Vocabulary

__all__ = ["Engine", "Scorer", "Vocabulary", "scoring_engine"]


def scoring_engine(config: ScoreConfig) -> Engine:
    """The engine that the config names, its model not loaded yet."""
    module = import_module(f".{config.teacher.engine}", __package__)
    return module.ENGINE(config)
