"""What a checkpoint holds: a trainer's tensors by name, and its counters and random states.

checkpoint.py calls `run_tensors` and `run_record` to write, `read_run` to read a checkpoint
completely before any of it enters the trainer, and `SavedRun.apply`. Tensors are in shards/
(shards.py), all else in trainer.json.

    model.<parameter>               the student's; with adapters only theirs
    optimizer.<state>.<parameter>   exp_avg, exp_avg_sq, step, …
    teacher.<parameter>             while the teacher differs from the base policy
"""

import base64
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..schemas.configs import GateConfig
from ..schemas.errors import InputError
from .folders import FAILURES
from .gate_limits import read_limits, saved_limits
from .identity import TRAINER_FILE
from .lora import AdapterView
from .packing import PackedModel
from .ranks import local_tensor
from .shards import Described, Tensors, described, read_shards
from .trainer import Trainer, TrainerState

SHARDS = "shards"
WRAPPER = "model."  # prefix of a PackedModel's parameter names
MODEL, _OPTIMIZER, _TEACHER = "model.", "optimizer.", "teacher."
_LIMITS = "limits"  # of the state
_CHUNK = 1 << 24  # numbers


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint in memory.

    model, teacher: tensors by name, sharded as the trainer's; teacher: None if none is stored.
    has_teacher: whether the run still had one. optimizer: the parameters with a state, which is in
    the optimiser already. numbers: of its states those that are no tensors.
    """

    model: Tensors
    teacher: Tensors | None
    has_teacher: bool
    optimizer: frozenset[str]
    numbers: dict[str, dict[str, float]]
    state: TrainerState
    rng: dict[str, Any]

    @torch.no_grad()
    def apply(self, trainer: Trainer) -> None:
        """Load it into the trainer that it was read for."""
        _copy(self.model, module_tensors(trainer.trained))
        if not self.has_teacher:
            trainer.teacher = None
        elif self.teacher is not None and trainer.teacher is not None:
            _copy(self.teacher, module_tensors(trainer.teacher))
        states = trainer.optimizer.state
        for name, parameter in trained_parameters(trainer).items():
            if name not in self.optimizer:
                states.pop(parameter, None)
            else:
                states[parameter].update(self.numbers.get(name, {}))
        trainer.state = self.state
        trainer.restore_identity()
        restore_rng_states(self.rng)


def module_tensors(part: PackedModel | AdapterView) -> Tensors:
    """Parameters and stored buffers by the model's own names, tied ones once; of a view its
    adapters.

    The base under adapters never changes, so no checkpoint holds it.
    """
    if isinstance(part, AdapterView):
        named = {name.removeprefix(WRAPPER): p for name, p in part.named_parameters()}
    else:
        model = part.model
        named = dict(model.named_parameters())
        all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        stored = model.state_dict()
        named |= {name: stored[name] for name in stored if name not in all_names}
    return {name: tensor.detach() for name, tensor in named.items()}


def trained_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """The parameters that the optimiser changes, by the model's own names."""
    named = trainer.student.model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def run_tensors(trainer: Trainer) -> Tensors:
    """All tensors of a checkpoint by name, sharded as they are, in the trainer's memory."""
    tensors = {MODEL + name: one for name, one in module_tensors(trainer.trained).items()}
    for name, parameter in trained_parameters(trainer).items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{key}.{name}"] = value.detach()
    if trainer.teacher is not None and _teacher_changes(trainer):
        tensors |= {_TEACHER + name: one for name, one in module_tensors(trainer.teacher).items()}
    return tensors


def run_record(trainer: Trainer) -> dict[str, Any]:
    """All of a checkpoint that is no tensor, for trainer.json."""
    numbers = {}
    for name, parameter in trained_parameters(trainer).items():
        state = trainer.optimizer.state.get(parameter, {})
        if plain := {key: v for key, v in state.items() if not isinstance(v, torch.Tensor)}:
            numbers[name] = plain
    return {
        "state": _saved_state(trainer.state),
        "teacher": trainer.teacher is not None,
        "optimizer": numbers,
        "rng": rng_states(),
        "base": trainer.policy.info.revision,
    }


def read_run(trainer: Trainer, checkpoint: Path, step: int) -> SavedRun:
    """Read this rank's part of a checkpoint. step: the one in the folder's name.

    The trainer's optimiser gets its state at once, in place; its weights do not change.

    Raises:
        InputError: something is missing, damaged, of a wrong type or of another model; the
            optimiser's state is cleared.
    """
    try:
        saved = json.loads((checkpoint / TRAINER_FILE).read_bytes())
        state = _state(saved["state"], step, trainer.config.loss.gates)
        has_teacher, numbers, rng = bool(saved["teacher"]), saved["optimizer"], saved["rng"]
        _check_rng_states(rng)
        stored = described(checkpoint / SHARDS)
        model = _targets(stored, MODEL, module_tensors(trainer.trained))
        teacher = None
        if has_teacher and trainer.teacher is None:
            raise ValueError("it holds a teacher, and this run has none")
        if has_teacher and trainer.teacher is not None and _teacher_changes(trainer):
            teacher = _targets(stored, _TEACHER, module_tensors(trainer.teacher))
        optimizer, names = _optimizer_targets(trainer, stored)
        _check_numbers(numbers, names)
        read_shards(model | (teacher or {}) | optimizer, checkpoint / SHARDS)
        for name, tensor in (model | (teacher or {}) | optimizer).items():
            _require_finite(name, tensor)
    except (
        *FAILURES, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError,
        AssertionError, OverflowError,
    ) as error:  # fmt: skip
        trainer.optimizer.state.clear()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{checkpoint}: is no state of this training run ({reason:.160}); take another "
            "checkpoint"
        ) from None
    return SavedRun(
        _without(MODEL, model), teacher and _without(_TEACHER, teacher), has_teacher, names,
        numbers, state, rng,
    )  # fmt: skip


def _teacher_changes(trainer: Trainer) -> bool:
    """Whether the teacher ever differs from the base policy, which every run starts with."""
    return trainer.config.teacher.sync != "frozen"


def _targets(stored: Mapping[str, Described], prefix: str, expected: Tensors) -> Tensors:
    """New tensors for the stored ones of a prefix, sharded as the expected ones.

    Raises ValueError unless names and shapes are those expected.
    """
    found = {name for name in stored if name.startswith(prefix)}
    for name in sorted(found | {prefix + name for name in expected}):
        own = name.removeprefix(prefix)
        if name not in found or own not in expected or stored[name].shape != expected[own].shape:
            raise ValueError(f"its {prefix[:-1]} differs from the run's in {own}")
    return {prefix + name: torch.empty_like(tensor) for name, tensor in expected.items()}


def _optimizer_targets(
    trainer: Trainer, stored: Mapping[str, Described]
) -> tuple[Tensors, frozenset[str]]:
    """The optimiser's own state tensors for the stored ones, and the parameters that have them.

    Raises ValueError if it has no such state, or one of another shape.
    """
    keys = [name.removeprefix(_OPTIMIZER) for name in stored if name.startswith(_OPTIMIZER)]
    parameters = trained_parameters(trainer)
    if keys:
        _make_states(trainer)
    targets: Tensors = {}
    for key in keys:
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise ValueError(f"its optimiser has a parameter {name!r:.80}")
        target = trainer.optimizer.state[parameters[name]].get(kind)
        if target is None or target.shape != stored[_OPTIMIZER + key].shape:
            raise ValueError(f"its optimiser's {kind} of {name} does not fit")
        targets[_OPTIMIZER + key] = target
    names = frozenset(key.partition(".")[2] for key in keys)
    for name in names:
        for kind, value in trainer.optimizer.state[parameters[name]].items():
            if isinstance(value, torch.Tensor) and f"{_OPTIMIZER}{kind}.{name}" not in targets:
                raise ValueError(f"its optimiser has no {kind} of {name}")
    return targets, names


def _check_numbers(numbers: dict[str, dict[str, float]], names: frozenset[str]) -> None:
    for name, plain in numbers.items():
        for key, value in plain.items():
            if name not in names or type(value) not in (int, float):
                raise ValueError(f"its optimiser's {key} of {name!r:.80} is {value!r:.40}")


@torch.no_grad()
def _make_states(trainer: Trainer) -> None:
    """Let the optimiser make its state tensors: a step without gradients at learning rate 0.

    Weights do not change: w · (1 - 0) - 0 · (0 / ε) is w.
    """
    optimizer = trainer.optimizer
    optimizer.state.clear()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _copy(source: Tensors, target: Tensors) -> None:
    for name, tensor in target.items():
        local_tensor(tensor).copy_(local_tensor(source[name]))


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    for chunk in local_tensor(tensor).flatten().split(_CHUNK):
        # NaN and infinity survive a sum; if it overflows, each number is checked.
        if not chunk.sum(dtype=torch.float32).isfinite() and not chunk.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def _saved_state(state: TrainerState) -> dict[str, Any]:
    """The counters, and the gates' limits where there are any: older checkpoints have none."""
    saved = {name: value for name, value in asdict(state).items() if name != _LIMITS}
    return saved if state.limits is None else saved | {_LIMITS: saved_limits(state.limits)}


def _state(found: dict[str, Any], step: int, gates: Sequence[GateConfig]) -> TrainerState:
    expected = _saved_state(TrainerState())
    limits = read_limits(found[_LIMITS], gates) if _LIMITS in found else None
    found = {name: value for name, value in found.items() if name != _LIMITS}
    if found.keys() != expected.keys():
        raise ValueError(f"its state has {sorted(found)}, not {sorted(expected)}")
    for name, default in expected.items():
        value = found[name]
        number = type(value) is int or (type(default) is float and type(value) is float)
        if not number or value < 0 or not math.isfinite(value):
            raise ValueError(f"its {name} is {value!r:.40}")
    if found["step"] != step:
        raise ValueError(f"it is of step {found['step']}, but its folder is of step {step}")
    return TrainerState(**found, limits=limits)


def rng_states() -> dict[str, Any]:
    """States of the global random generators, as JSON holds them; torch's as base64.

    This package draws from none of them, but a user's own rule or engine may.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in cuda],
        "python": random.getstate(),
        "numpy": [
            part.tolist() if isinstance(part, np.ndarray) else part
            for part in np.random.get_state()
        ],
    }


def restore_rng_states(states: dict[str, Any]) -> None:
    """Set the generators back to what `rng_states` returned."""
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])
    random.setstate(_python_state(states))
    np.random.set_state(tuple(states["numpy"]))


def _check_rng_states(states: dict[str, Any]) -> None:
    """Raises one of many errors if a generator would not accept its state."""
    torch.Generator().set_state(_bytes(states["torch"]))
    random.Random().setstate(_python_state(states))
    np.random.RandomState().set_state(tuple(states["numpy"]))
    for state in states["cuda"]:
        _bytes(state)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    content = base64.b64decode(text, validate=True)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _python_state(states: dict[str, Any]) -> Any:
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss
