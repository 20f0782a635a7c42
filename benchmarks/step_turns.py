"""What step.py and its measured processes exchange."""

import math
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

# warm-up: a step on responses cut to a few tokens, which allocates the optimiser's states;
# training: on the case's rollouts; generation: on rollouts sampled in the step;
# teacher: no step, only TRACE's teacher on the case's rollouts.
Mode = Literal["warm-up", "training", "generation", "teacher"]


class Measured(NamedTuple):
    """peak_mib: the turn's peak beyond resident_mib, the memory before it (weights, optimiser
    states, a teacher's weights). tokens: response tokens trained on. grad_norm: the step's gradient
    norm, known for a warm-up. flops: of the definition of MFU; predicted_mib: the plan's peak; both
    known for ours.
    """

    seconds: float
    peak_mib: float
    resident_mib: float
    tokens: int
    grad_norm: float
    flops: float | None
    predicted_mib: float | None


class Turns:
    """The measured process's side of the turns."""

    def __init__(self, pipe: Connection, device: str) -> None:
        from meter import Meter  # imports torch, which step.py itself does without

        self._pipe = pipe
        self._meter = Meter(device)

    def next(self) -> tuple[int, Mode]:
        """Wait for this process's turn: the index of a case, and what to do."""
        return self._pipe.recv()

    def begin(self) -> None:
        self._meter.begin()

    def end(
        self,
        tokens: int,
        grad_norm: float = math.nan,
        flops: float | None = None,
        predicted_mib: float | None = None,
    ) -> None:
        seconds, peak = self._meter.end()
        before = self._meter.resident_mib
        self._pipe.send(Measured(seconds, peak, before, tokens, grad_norm, flops, predicted_mib))
