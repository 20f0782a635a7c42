"""Gates: factors of a routed token's weight, each from one signal of the token.

Both implementations of the loss call `gate_factors` where a token's signals are known. A gate with
a quantile, and the signal importance, measure a token by the step before: `limits_of` gives its
limits, the trainer keeps them. So one pass suffices, and the factors do not depend on how a step is
cut into micro-batches or distributed over ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..schemas.configs import GateConfig
from ..schemas.labels import Route, Signal
from .losses import LossInputs, LossOutput
from .transfer import to_device

# Quantile of entropy and divergence that importance counts as 1: outliers do not set the scale
# (TIP, arXiv 2604.14084, section 7.3).
_MAXIMUM = 0.98
_PARTS = {Signal.IMPORTANCE: (Signal.STUDENT_ENTROPY, Signal.DIVERGENCE)}


@dataclass(frozen=True)
class Limits:
    """What gates take from a step's routed tokens; plain numbers, for a checkpoint.

    thresholds: one per gate of `loss.gates`, in its signal's unit; None for a gate with `at`.
    entropy_max, divergence_max: what importance counts as 1, nats; None where no gate reads it.
    """

    thresholds: tuple[float | None, ...]
    entropy_max: float | None = None
    divergence_max: float | None = None


def signals_read(gates: Sequence[GateConfig]) -> set[Signal]:
    """The signals that have to be known of a token; importance is made of two."""
    return {part for gate in gates for part in _PARTS.get(gate.of, (gate.of,))}


def needs_limits(gates: Sequence[GateConfig]) -> bool:
    """Whether a gate measures tokens by the step before."""
    return any(gate.quantile is not None or gate.of is Signal.IMPORTANCE for gate in gates)


def gate_factors(
    gates: Sequence[GateConfig], signals: Mapping[Signal, torch.Tensor], limits: Limits | None
) -> torch.Tensor:
    """The product of all gates, (tokens,), without gradient; see GateConfig for the shapes.

    signals: those of `signals_read`, (tokens,) each. limits: the step before's; None for the first
    step, in which gates that need them are 1. A token exactly at the place of above or below is on
    the gate's side.
    """
    factor = torch.ones_like(next(iter(signals.values())))
    for index, gate in enumerate(gates):
        at = gate.at
        if at is None and limits is not None:
            at = limits.thresholds[index]
        if at is None:
            continue
        if gate.of is Signal.IMPORTANCE:
            if limits is None or limits.entropy_max is None or limits.divergence_max is None:
                continue
            x = importance(
                signals[Signal.STUDENT_ENTROPY],
                signals[Signal.DIVERGENCE],
                limits.entropy_max,
                limits.divergence_max,
            )
        else:
            x = signals[gate.of]
        factor = factor * _factor(gate, x, at)
    return factor


def _factor(gate: GateConfig, x: torch.Tensor, at: float) -> torch.Tensor:
    if gate.shape == "signed":
        return torch.tanh((at - x) / gate.scale)
    if gate.shape in ("above", "below"):
        inside = (x >= at if gate.shape == "above" else x <= at).to(x.dtype)
    else:
        sign = 1 if gate.shape == "rising" else -1
        inside = torch.sigmoid(sign * (x - at) / gate.scale)
    return gate.floor + (1 - gate.floor) * inside


def importance(
    entropy: torch.Tensor, divergence: torch.Tensor, entropy_max: float, divergence_max: float
) -> torch.Tensor:
    """1 − (1 − h)(1 − d), (tokens,): h and d are the shares of their maxima, in 0 … 1.

    Source: TIP, arXiv 2604.14084, eq. 7.
    """
    h = (entropy / max(entropy_max, 1e-12)).clamp(0, 1)
    d = (divergence / max(divergence_max, 1e-12)).clamp(0, 1)
    return 1 - (1 - h) * (1 - d)


def routed_signals(
    output: LossOutput, inputs: LossInputs, gates: Sequence[GateConfig]
) -> dict[Signal, torch.Tensor]:
    """The signals of a micro-batch's routed tokens, (routed,) each, for `limits_of`."""
    kinds = inputs.route.cpu().numpy() if inputs.host_route is None else inputs.host_route
    at = to_device(torch.from_numpy(np.flatnonzero(kinds != int(Route.GRPO))), output.kl.device)
    columns = {
        Signal.TEACHER_ENTROPY: output.teacher_entropy,
        Signal.STUDENT_ENTROPY: output.entropy,
        Signal.DIVERGENCE: output.kl,
        Signal.POSITION: inputs.position,
    }
    read = {signal: columns[signal] for signal in signals_read(gates)}
    return {signal: column[at] for signal, column in read.items() if column is not None}


def limits_of(gates: Sequence[GateConfig], values: Mapping[Signal, np.ndarray]) -> Limits | None:
    """The limits that a step's routed tokens set for the next one; None if it has no such token.

    values: `routed_signals` of all the step's micro-batches on all ranks, (routed,) each.
    """
    if not all(len(values[signal]) for signal in signals_read(gates)):
        return None
    known = {signal: torch.from_numpy(np.asarray(x, np.float64)) for signal, x in values.items()}
    maxima: tuple[float, float] | None = None
    if any(gate.of is Signal.IMPORTANCE for gate in gates):
        entropy, divergence = (known[part] for part in _PARTS[Signal.IMPORTANCE])
        maxima = (_quantile(entropy, _MAXIMUM), _quantile(divergence, _MAXIMUM))
        known[Signal.IMPORTANCE] = importance(entropy, divergence, *maxima)
    thresholds = [
        None if gate.quantile is None else _quantile(known[gate.of], gate.quantile)
        for gate in gates
    ]
    return Limits(tuple(thresholds), *(maxima or (None, None)))


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(np.quantile(values.numpy(), share))
