"""What a checkpoint holds besides its model: written, read, and checked.

checkpoint.py calls `read_run` to read a checkpoint completely before any of it enters the trainer.
The optimiser's, teacher's and generators' nested state is one safetensors file: tensors by their
path, and all else as JSON in the header. Nothing is pickled, so a foreign checkpoint runs no code.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..schemas.errors import InputError
from .identity import CHECKSUMS, TRAINER_FILE
from .loading import load_model, require_finite
from .lora import has_adapters, read_adapters
from .trainer import Trainer, TrainerState

WRAPPER = "model."  # prefix of PackedModel's parameter names
_TREE = "tree"
_TENSOR = "tensor"  # the one key of a mapping that stands for a tensor


@dataclass(frozen=True)
class SavedRun:
    """weights: the student's, or only its adapters if it has any; teacher: None once λ is 0."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: TrainerState
    teacher: dict[str, torch.Tensor] | None
    rng: dict[str, Any]


def read_run(trainer: Trainer, checkpoint: Path, step: int) -> SavedRun:
    """Read a checkpoint for a trainer without changing it. step: the one in the folder's name.

    A checkpoint of an older version has no checksums; everything else is always checked.

    Raises:
        InputError: something is missing, damaged, of a wrong type or of another model.
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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{file}: is no state of this training run ({reason:.160}); take another checkpoint"
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
        raise ValueError(f"it is of step {found['step']}, but its folder is of step {step}")
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
    """States of the global random generators.

    This package draws from none of them, but a user's own rule or engine may.
    """
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
    """Set the generators back to what `rng_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(_python_state(states))
    np.random.set_state(tuple(states["numpy"]))


def _check_rng_states(states: dict[str, Any]) -> None:
    """Raises one of many errors if a generator would not accept its state."""
    torch.Generator().set_state(states["torch"])
    random.Random().setstate(_python_state(states))
    np.random.RandomState().set_state(tuple(states["numpy"]))
    if not all(state.dtype == torch.uint8 for state in states["cuda"]):
        raise TypeError("a CUDA generator's state is bytes")


def _python_state(states: dict[str, Any]) -> Any:
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dictionaries with text keys, lists, tuples, numbers, texts and tensors.

    `load_state` returns tuples as lists, and tensors on the CPU. Tensors that share memory are
    written once.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}

    def described(node: Any, at: str) -> Any:
        if isinstance(node, torch.Tensor):
            kept = node.detach().cpu().contiguous()
            seen = (kept.data_ptr(), kept.shape, kept.dtype) if kept.numel() else at
            name = names.setdefault(seen, at)
            tensors.setdefault(name, kept)
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {key: described(child, f"{at}/{key}") for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [described(child, f"{at}/{index}") for index, child in enumerate(node)]
        return node

    tree = json.dumps(described(state, ""))
    save_file(tensors, path, metadata={_TREE: tree})


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, with tensors on the CPU.

    Raises:
        InputError: no such file, or one that `save_state` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads(file.metadata()[_TREE])

            def built(node: Any) -> Any:
                if isinstance(node, dict):
                    if node.keys() == {_TENSOR}:
                        return file.get_tensor(node[_TENSOR])
                    return {key: built(child) for key, child in node.items()}
                if isinstance(node, list):
                    return [built(child) for child in node]
                return node

            state = built(tree)
            if not isinstance(state, dict):
                raise TypeError(f"a mapping is expected, not {type(state).__name__}")
            return state
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is no state of a training run ({error}); remove its folder, and the run "
            "resumes "
            "from the checkpoint before"
        ) from None
