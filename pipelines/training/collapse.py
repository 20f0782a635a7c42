"""Warns of a training that collapses, and ends it where its config asks (trace/collapse.py).

loop.py calls `observe` after each step, and `stop_after` once the step is logged.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...schemas.configs import TrainConfig
from ...schemas.errors import Collapsed, InputError
from ...schemas.presets import PRESETS, preset_data
from ...schemas.settings import overlaid
from ...trace.collapse import Alarm, CollapseWatch
from ...trace.ranks import Ranks
from ..run_metrics import METRICS, read_metrics
from .validation import base_scores

logger = logging.getLogger(__name__)


class CollapseGuard:
    """A run's watch. Every rank has one; all see the same metrics."""

    def __init__(self, config: TrainConfig, run: Path, done: int, ranks: Ranks) -> None:
        """run: the run's folder, whose metrics of the `done` first steps are seen again.

        Raises:
            Collapsed: they end in a collapse, and the run is to stop on one.
        """
        self._config, self._ranks = config, ranks
        self._last = config.offline.steps + config.online.steps - 1
        known = None
        if ranks.first:
            lines = [line for line in read_metrics(run / METRICS) if line["step"] < done]
            known = lines, base_scores(run)
        lines, base = ranks.broadcast(known)
        self._base = {f"{name}_base": rate for name, (rate, _) in base.items()}
        self._watch = CollapseWatch(config.collapse, base)
        self._warned = {alarm.figure for line in lines for alarm in self._watch.observe(line)}
        self._stop()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Observe a step; each figure is warned of once a run."""
        for alarm in self._watch.observe(metrics):
            if self._ranks.first and alarm.figure not in self._warned:
                logger.warning("%s", warning(self._config, alarm))
            self._warned.add(alarm.figure)

    def figures(self, done: int) -> dict[str, float]:
        """What was compared with which limit at the last observed step, for charts; after the
        first of the `done` steps also the validation before it.
        """
        watched = {f"collapse/{name}": value for name, value in self._watch.figures.items()}
        return watched | (self._base if done == 1 else {})

    def stop_after(self, metrics: Mapping[str, Any]) -> None:
        """Call when the step is logged.

        Raises:
            Collapsed: on every rank, before the last step.
        """
        if metrics["step"] < self._last:  # after the last step nothing is left to stop
            self._stop()

    def _stop(self) -> None:
        if not self._config.stop_on_collapse:
            return
        # The first rank decides: a difference of one bit must not leave the others waiting.
        if (alarm := self._ranks.broadcast(next(iter(self._watch.active.values()), None))) is None:
            return
        raise Collapsed(
            f"stopped after a collapse: {warning(self._config, alarm)}; a checkpoint is kept: the "
            "same command with stop_on_collapse=false goes on from it (in a pipeline "
            "train.stop_on_collapse=false), and a new run may do better with a lower optim.lr or "
            "schedule.w0, or fewer routed tokens"
        )


def warning(config: TrainConfig, alarm: Alarm) -> str:
    """What collapsed, when, and in which method."""
    return f"{method_name(config)}, step {alarm.step}: {alarm}"


def method_name(config: TrainConfig) -> str:
    """The preset whose settings the config has, the one that sets most; else its routing."""
    if not config.online.steps:
        return f"training on {config.offline.routed}"  # whose convert stage has routed it
    fitting = {name: _leaves(preset_data(name, TrainConfig)) for name in PRESETS}
    fitting = {name: count for name, count in fitting.items() if _has(config, name)}
    if fitting:
        return f"preset {max(fitting, key=fitting.__getitem__)}"
    routing = config.online.routing.model_dump(mode="json")
    names = ("rule", "key", "error", "teacher_context")
    return ", ".join(f"{name}={routing[name]}" for name in names)


def _has(config: TrainConfig, preset: str) -> bool:
    try:
        return overlaid(config, preset_data(preset, TrainConfig), []) == config
    except InputError:  # the preset does not go with another setting
        return False


def _leaves(data: Any) -> int:
    return sum(map(_leaves, data.values())) if isinstance(data, dict) else 1
