"""The watch on collapse: a step's metrics against the first steps', a validation against its best.

pipelines/training/collapse.py feeds it with the lines of metrics.jsonl, warns and stops. It has no
other input, so a resumed run that feeds the lines before its checkpoint goes on as it was.

What falls apart, and where the limits come from (schemas.configs.train.CollapseConfig):

- response_tokens: self-distillation on all tokens shortens responses, 2027 to 1042 tokens and 1873
  to 759 in TRACE's sweeps (arXiv 2605.10194), so 0.6 of the first steps' finds both
- entropy: there it ends above 4 times GRPO's. GRPO's own falls, so only a rise counts
- looping (repetition.py): the clip study (arXiv 2609.38995) counts 3 to 50 % of a phase's responses
  in the runs that fail, and at most 0.3 % in their twins
- pass_rate of the training problems, and of a validation, which is the surest sign. Both are
  estimates from few answers, so a fall counts beyond 3 standard errors alone
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from ..schemas.configs.train import CollapseConfig

WATCHED = ("response_tokens", "entropy", "looping", "pass_rate")
_ERRORS = 3.0  # standard errors beyond which a fall of a pass rate is no chance


@dataclass(frozen=True)
class Alarm:
    """A figure beyond its limit; step: from 0; before: what it is compared with."""

    step: int
    figure: str
    value: float
    before: float
    limit: float

    def __str__(self) -> str:
        side = "below" if self.value < self.before else "above"
        return (
            f"{self.figure} is {self.value:.3g}, {side} the limit {self.limit:.3g} (before: "
            f"{self.before:.3g})"
        )


class CollapseWatch:
    """Sees every step's metrics in order; `active` holds the figures that are beyond a limit.

    figures: of the last step, by name: what was compared, and `<name>_limit`; `alarms`, how many
    are active.
    """

    def __init__(
        self, config: CollapseConfig, base: Mapping[str, tuple[float, int]] | None = None
    ) -> None:
        """base: pass rate and number of answers of the validation before the first step, by the
        names of metrics (`validation_<split>_<decoding>`).
        """
        self._config = config
        self._steps: dict[str, list[float]] = {name: [] for name in WATCHED}
        self._errors: list[float] = []  # of pass_rate
        self._best = {name: rate for name, (rate, _) in (base or {}).items()}
        self._answers = {name: answers for name, (_, answers) in (base or {}).items()}
        self.active: dict[str, Alarm] = {}
        self.figures: dict[str, float] = {}

    def observe(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Add a step's metrics; returns the alarms that this step raised."""
        before = self.active.keys()
        step = int(metrics["step"])
        found: dict[str, Alarm] = {}
        figures: dict[str, float] = {}
        for name, (value, first, limit) in self._of_steps(metrics).items():
            figures |= {name: value, f"{name}_limit": limit}
            if value > limit if limit > first else value < limit:
                found[name] = Alarm(step, name, value, first, limit)
        for name, best in self._best.items():
            if name not in metrics:  # not evaluated at this step, so an alarm stays
                if name in self.active:
                    found[name] = self.active[name]
                continue
            rate = float(metrics[name])
            limit = best - max(self._config.validation_drop, _ERRORS * self._error(name, rate))
            figures |= {name: rate, f"{name}_limit": limit}
            if rate < limit:
                found[name] = Alarm(step, name, rate, best, limit)
            self._best[name] = max(best, rate)
        raised = [alarm for name, alarm in found.items() if name not in before]
        self.active = found
        self.figures = figures | {"alarms": float(len(found))}
        return raised

    def _of_steps(self, metrics: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
        """Value, first steps' value and limit of each figure that has enough steps.

        A step lacks a figure where it has no responses, or trains none.
        """
        config, found = self._config, {}
        if "pass_rate" in metrics:  # one group has no standard error: its pass rate says nothing
            self._errors.append(float(metrics.get("pass_rate_se", inf)))
        for name, steps in self._steps.items():
            if name in metrics:
                steps.append(float(metrics[name]))
            if len(steps) < config.baseline_steps + config.window_steps:
                continue
            first = median(steps[: config.baseline_steps])
            found[name] = median(steps[-config.window_steps :]), first, self._limit(name, first)
        return found

    def _limit(self, name: str, first: float) -> float:
        config = self._config
        if name == "response_tokens":
            return config.length_ratio * first
        if name == "entropy":
            return config.entropy_ratio * first
        if name == "looping":
            return first + config.looping
        return min(config.pass_rate_ratio * first, first - _ERRORS * self._step_error())

    def _step_error(self) -> float:
        """Standard error of the difference between the first and the latest steps' pass rates."""
        config, errors = self._config, self._errors
        parts = errors[: config.baseline_steps], errors[-config.window_steps :]
        return sum(sum(error**2 for error in part) / len(part) ** 2 for part in parts) ** 0.5

    def _error(self, name: str, rate: float) -> float:
        """Standard error of the difference between a validation's rate and the best one.

        The binomial one: at most this, because both answer the same problems.
        """
        best, answers = self._best[name], self._answers[name]
        return ((best * (1 - best) + rate * (1 - rate)) / answers) ** 0.5
