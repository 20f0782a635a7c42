"""What a checkpoint holds, read and checked before any of it enters the trainer."""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..schemas.errors import InputError
from .checksums import CHECKSUMS
from .identity import TRAINER_FILE
from .loading import load_model, require_finite
from .lora import has_adapters, read_adapters
from .state_file import load_state
from .trainer import Trainer, TrainerState

WRAPPER = "model."  # of trace.packing.PackedModel


@dataclass(frozen=True)
class SavedRun:
    """weights: the student's, of a policy with adapters theirs alone; teacher: None once λ is 0."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: TrainerState
    teacher: dict[str, torch.Tensor] | None
    rng: dict[str, Any]


def read_run(trainer: Trainer, checkpoint: Path, step: int) -> SavedRun:
    """Read a checkpoint for a trainer, which stays as it is. step: the one in its name.

    A checkpoint without checksums is from a version that wrote none; all else is checked.

    Raises:
        InputError: something is missing, torn, of a wrong type or of another model.
    """
    file = checkpoint / TRAINER_FILE
    saved = load_state(file)
    if saved.get("checksums") and not (checkpoint / CHECKSUMS).exists():
        raise InputError(f"{checkpoint}: {CHECKSUMS} is missing; take another checkpoint")
    weights = _weights(trainer, checkpoint)
    try:
        state = _state(saved["state"], step)
        optimizer, teacher, rng = saved["optimizer"], saved["teacher"], saved["rng"]
        _check_optimizer(trainer, optimizer)
        if teacher is not None:
            if trainer.teacher is None:
                raise ValueError("it holds a teacher, and this run has none")
            _check_shapes(teacher, trainer.teacher.state_dict(), "teacher")
        _check_rng_states(rng)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{file}: is no state of this training run ({said:.160}); take another checkpoint"
        ) from None
    return SavedRun(weights, optimizer, state, teacher, rng)


def _weights(trainer: Trainer, checkpoint: Path) -> dict[str, torch.Tensor]:
    model = trainer.policy.model
    if has_adapters(model):
        return read_adapters(model, checkpoint)
    dtype = next(trainer.student.parameters()).dtype
    trusted = trainer.config.policy.trust_remote_code
    read = load_model(str(checkpoint), dtype, trusted)
    require_finite(read, str(checkpoint))
    weights = {WRAPPER + name: value for name, value in read.state_dict().items()}
    try:
        _check_shapes(weights, trainer.student.state_dict(), "model")
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}; take another checkpoint") from None
    return weights


def _state(found: dict[str, Any], step: int) -> TrainerState:
    expected = asdict(TrainerState())
    if found.keys() != expected.keys():
        raise ValueError(f"its state has {sorted(found)}, not {sorted(expected)}")
    for name, default in expected.items():
        value = found[name]
        number = type(value) is int or (type(default) is float and type(value) is float)
        if not number or value < 0 or not math.isfinite(value):
            raise ValueError(f"its {name} is {value!r:.40}")
    if found["step"] != step:
        raise ValueError(f"it is of step {found['step']}, and its folder says {step}")
    return TrainerState(**found)


def _check_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless both have the same names and shapes."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise ValueError(f"its {what} differs from the run's in {name}")


def _check_optimizer(trainer: Trainer, found: dict[str, Any]) -> None:
    shapes = {n: p.shape for n, p in trainer.student.named_parameters() if p.requires_grad}
    (group,) = found["param_groups"]
    for name in [*found["state"], *group["params"]]:
        if name not in shapes:
            raise ValueError(f"its optimiser has a parameter {name!r:.80}")
    for name, moments in found["state"].items():
        if not float(moments["step"]) >= 0:
            raise ValueError(f"its optimiser's step of {name} is {moments['step']}")
        for moment in ("exp_avg", "exp_avg_sq"):
            tensor = moments[moment]
            if tensor.shape != shapes[name] or not tensor.sum(dtype=torch.float32).isfinite():
                raise ValueError(f"its optimiser's {moment} of {name} does not fit")


def rng_states() -> dict[str, Any]:
    """Nothing here draws from the global generators; what a user plugs in may."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [
            part.tolist() if isinstance(part, np.ndarray) else part
            for part in np.random.get_state()
        ],
    }


def restore_rng_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since `rng_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(_python_state(states))
    np.random.set_state(tuple(states["numpy"]))


def _check_rng_states(states: dict[str, Any]) -> None:
    """Raises one of many errors if a generator would not take its state."""
    torch.Generator().set_state(states["torch"])
    random.Random().setstate(_python_state(states))
    np.random.RandomState().set_state(tuple(states["numpy"]))
    if not all(state.dtype == torch.uint8 for state in states["cuda"]):
        raise TypeError("a CUDA generator's state is bytes")


def _python_state(states: dict[str, Any]) -> Any:
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss
