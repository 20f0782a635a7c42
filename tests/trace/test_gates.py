"""Gates on hand-made numbers, and the limits that a step sets for the next one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.labels import Signal
from trace_opd.tests.trace.twin import made_case, ours
from trace_opd.tests.trace.twin_options import with_options
from trace_opd.trace.gates import (
    Limits,
    gate_factors,
    importance,
    limits_of,
    needs_limits,
    routed_signals,
    signals_read,
)
from trace_opd.trace.metrics import SUMS, TokenSums

X = Signal.TEACHER_ENTROPY


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def factors(gate: GateConfig, *numbers: float, limits: Limits | None = None) -> list[float]:
    return gate_factors([gate], {gate.of: values(*numbers)}, limits).tolist()


SIGMOID = 1 / (1 + math.e)  # σ(−1)
SHAPES = {
    "above": (GateConfig(of=X, shape="above", at=1.0), [0.0, 1.0, 1.0]),
    "below": (GateConfig(of=X, shape="below", at=1.0), [1.0, 1.0, 0.0]),
    "below, with a floor": (GateConfig(of=X, shape="below", at=1.0, floor=0.2), [1.0, 1.0, 0.2]),
    "above, else ascent": (GateConfig(of=X, shape="above", at=1.0, floor=-1.0), [-1.0, 1.0, 1.0]),
    "rising": (GateConfig(of=X, shape="rising", at=1.0, scale=0.5), [SIGMOID, 0.5, 1 - SIGMOID]),
    "falling": (GateConfig(of=X, shape="falling", at=1.0, scale=0.5), [1 - SIGMOID, 0.5, SIGMOID]),
    "rising from a floor": (
        GateConfig(of=X, shape="rising", at=1.0, scale=0.5, floor=0.5),
        [0.5 + SIGMOID / 2, 0.75, 1 - SIGMOID / 2],
    ),
    "signed": (
        GateConfig(of=X, shape="signed", at=1.0, scale=0.5),
        [math.tanh(1), 0.0, -math.tanh(1)],
    ),
}


@pytest.mark.parametrize(("gate", "expected"), SHAPES.values(), ids=SHAPES.keys())
def test_a_gate_by_hand(gate, expected):
    assert factors(gate, 0.5, 1.0, 1.5) == pytest.approx(expected)


def test_position_weights_of_pw_opsd():
    """0.25 + 0.75 σ((u − 0.3) / 0.1), arXiv 2605.21606: 0.286, 0.625 and 0.999."""
    gate = GateConfig(of=Signal.POSITION, shape="rising", at=0.3, scale=0.1, floor=0.25)
    assert factors(gate, 0.0, 0.3, 1.0) == pytest.approx([0.2856, 0.625, 0.9993], abs=1e-4)


def test_gates_multiply():
    gates = [
        GateConfig(of=X, shape="above", at=1.0, floor=0.5),
        GateConfig(of=Signal.POSITION, shape="below", at=0.5, floor=-1.0),
    ]
    signals = {X: values(0, 0, 2, 2), Signal.POSITION: values(0, 1, 0, 1)}
    assert gate_factors(gates, signals, None).tolist() == [0.5, -0.5, 1.0, -1.0]


# Student entropy and divergence of five tokens; 2 and 0.5 nats count as 1.
ENTROPIES = values(0.0, 2.0, 1.0, 0.0, 9.0)
DIVERGENCES = values(0.0, 0.0, 0.25, 0.5, 9.0)
SCORES = [0.0, 1.0, 1 - 0.5 * 0.5, 1.0, 1.0]


def test_importance_is_high_where_either_signal_is():
    """TIP's soft OR on a table: unsure, or sure and wrong (arXiv 2604.14084, eq. 7)."""
    assert importance(ENTROPIES, DIVERGENCES, 2.0, 0.5).tolist() == SCORES
    gate = GateConfig(of=Signal.IMPORTANCE, shape="above", quantile=0.5)
    signals = {Signal.STUDENT_ENTROPY: ENTROPIES, Signal.DIVERGENCE: DIVERGENCES}
    found = gate_factors([gate], signals, Limits((0.9,), 2.0, 0.5))
    assert found.tolist() == [0, 1, 0, 1, 1]
    # Nothing diverges: the entropy alone decides.
    assert importance(ENTROPIES, torch.zeros(5).double(), 2.0, 0.0).tolist() == [0, 1, 0.5, 0, 1]


def test_a_step_s_limits_are_quantiles_of_its_routed_tokens():
    gates = [
        GateConfig(of=X, shape="above", quantile=0.75),
        GateConfig(of=Signal.POSITION, shape="above", at=0.5),
        GateConfig(of=Signal.IMPORTANCE, shape="above", quantile=0.5),
    ]
    found = limits_of(
        gates,
        {
            X: np.array([0.0, 1.0, 2.0, 3.0, 4.0]),
            Signal.STUDENT_ENTROPY: np.linspace(0, 1, 51),
            Signal.DIVERGENCE: np.zeros(51),
            Signal.POSITION: np.zeros(5),
        },
    )
    assert found is not None
    assert (found.entropy_max, found.divergence_max) == (pytest.approx(0.98), 0.0)
    assert found.thresholds == (3.0, None, pytest.approx(0.5 / 0.98))
    assert limits_of(gates[:1], {X: np.array([])}) is None


def test_without_a_step_before_gates_that_need_it_are_one():
    quantile = GateConfig(of=X, shape="above", quantile=0.5)
    fixed = GateConfig(of=X, shape="above", at=1.0)
    assert factors(quantile, 0.0, 2.0) == [1, 1]
    assert factors(quantile, 0.0, 2.0, limits=Limits((1.0,))) == [0, 1]
    assert needs_limits([quantile])
    assert not needs_limits([fixed])
    important = GateConfig(of=Signal.IMPORTANCE, shape="above", at=0.5)
    assert needs_limits([important])
    assert signals_read([important]) == {Signal.STUDENT_ENTROPY, Signal.DIVERGENCE}
    signals = {Signal.STUDENT_ENTROPY: ENTROPIES, Signal.DIVERGENCE: DIVERGENCES}
    assert gate_factors([important], signals, None).tolist() == [1] * 5


def test_limits_do_not_depend_on_how_a_step_is_cut():
    gates = [GateConfig(of=signal, shape="above", quantile=0.5) for signal in Signal]
    config = LossConfig(gates=gates)
    case = with_options(made_case([1, 0, 2, 3, 0, 1]), contrast=False)

    def signals(tokens: slice, routed: slice) -> dict[Signal, np.ndarray]:
        named = {name: x[tokens] for name, x in vars(case.inputs).items() if torch.is_tensor(x)}
        part = replace(
            case,
            hidden=case.hidden[tokens],
            inputs=replace(case.inputs, **named),
            teacher_hidden=case.teacher_hidden[routed],
        )
        found = routed_signals(ours(part, config, 0.3, 0.4), part.inputs, gates)
        return {signal: column.numpy() for signal, column in found.items()}

    at_once = signals(slice(6), slice(4))
    assert {len(column) for column in at_once.values()} == {4}
    assert all((column > 0).all() for column in at_once.values())
    one, other = signals(slice(3), slice(2)), signals(slice(3, 6), slice(2, 4))
    cut = {signal: np.concatenate((other[signal], one[signal])) for signal in one}
    expected, got = limits_of(gates, at_once), limits_of(gates, cut)
    assert expected is not None
    assert got is not None
    assert got.thresholds == pytest.approx(expected.thresholds)
    assert got.divergence_max == pytest.approx(expected.divergence_max)


def test_metrics_of_gates():
    """Of routed tokens alone: the mean factor, and the share that a gate shuts out."""
    case = with_options(made_case([1, 0, 2, 3, 0, 1]), contrast=False)
    gate = GateConfig(of=Signal.POSITION, shape="above", at=0.5)
    position = values(0.1, 0.9, 0.6, 0.7, 0.1, 0.2)
    case = replace(case, inputs=replace(case.inputs, position=position))
    config = LossConfig(gates=[gate])

    def sums(gated: bool) -> dict[str, float]:
        step = TokenSums(torch.device("cpu"), gated)
        step.add(ours(case, config, 0.3, 0.4), case.inputs, with_kl=True)
        return dict(zip(SUMS, step.read()[0], strict=True))

    found = sums(gated=True)
    assert (found["gate"], found["gate_closed"], found["gated_tokens"]) == (2, 2, 4)
    assert found["fkl_tokens"] == 2
    without = sums(gated=False)
    assert (without["gate"], without["gate_closed"], without["gated_tokens"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"at": 1.0, "quantile": 0.5}, "either at or quantile"),
        ({"shape": "above", "at": 1.0, "scale": 2.0}, "scale has no effect"),
        ({"shape": "signed", "at": 1.0, "floor": 0.5}, "floor has no effect"),
    ],
)
def test_a_gate_has_no_setting_without_effect(fields, words):
    with pytest.raises(ValidationError, match=words):
        GateConfig(**{"of": X, "shape": "rising"} | fields)
