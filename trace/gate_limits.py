"""What gates take from one step for the next, over all its micro-batches and ranks.

trainer.py collects a step's signals and keeps the limits in its state, which checkpoints hold.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..schemas.configs import GateConfig
from ..schemas.labels import Signal
from .gates import Limits, limits_of, needs_limits, routed_signals
from .losses import LossInputs, LossOutput
from .ranks import Ranks


class StepSignals:
    """The signals of a step's routed tokens on this rank; nothing where no gate needs limits."""

    def __init__(self, gates: Sequence[GateConfig]) -> None:
        self._gates = gates
        self._needed = needs_limits(gates)
        self._parts: dict[Signal, list[torch.Tensor]] = {}  # on the device: reading them waits

    def add(self, output: LossOutput, inputs: LossInputs) -> None:
        """Add a micro-batch that had a teacher."""
        if self._needed:
            for signal, values in routed_signals(output, inputs, self._gates).items():
                self._parts.setdefault(signal, []).append(values)

    def limits(self, ranks: Ranks) -> Limits | None:
        """The limits of all ranks' tokens, the same on every rank, which has to call; None where no
        gate needs them, or without such tokens."""
        if not self._needed:
            return None
        own = {signal: torch.cat(parts).cpu().numpy() for signal, parts in self._parts.items()}
        everyone = ranks.gather(own)
        found = {
            signal: np.concatenate([part[signal] for part in everyone if signal in part])
            for signal in set().union(*everyone)
        }
        return limits_of(self._gates, found) if found else None


def saved_limits(limits: Limits) -> dict[str, Any]:
    """Limits as JSON data, which keeps every bit."""
    return {
        "thresholds": list(limits.thresholds),
        "entropy_max": limits.entropy_max,
        "divergence_max": limits.divergence_max,
    }


def read_limits(saved: dict[str, Any], gates: Sequence[GateConfig]) -> Limits:
    """Limits from `saved_limits`.

    Raises:
        ValueError: they are not those of these gates.
    """
    limits = Limits(tuple(saved["thresholds"]), saved["entropy_max"], saved["divergence_max"])
    numbers = [*limits.thresholds, limits.entropy_max, limits.divergence_max]
    wrong = [x for x in numbers if x is not None and not (type(x) is float and math.isfinite(x))]
    expected = [gate.quantile is None for gate in gates]
    if wrong or saved.keys() != saved_limits(limits).keys():
        raise ValueError(f"its gates' limits hold {wrong or sorted(saved)!r:.80}")
    if [threshold is None for threshold in limits.thresholds] != expected:
        raise ValueError(f"it has {len(limits.thresholds)} gates' limits, this run other gates")
    return limits
