"""Checkpoints: a transformers model folder, and beside it what a resumed run needs.

step-00050/  config.json model.safetensors tokenizer.json …   AutoModelForCausalLM, vLLM
             (adapter_config.json adapter_model.safetensors     peft, when adapters are trained)
             trainer.safetensors                                optimiser, teacher, state, RNGs

Weights are stored whole, so a run may go on under another number of ranks.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ..data.files import sync
from ..schemas.errors import InputError
from .loading import load_model
from .lora import (
    has_adapters,
    load_adapters,
    save_adapters,
    save_merged,
    transformers_model,
)
from .ranks import load_optimizer, load_weights, whole_optimizer, whole_weights
from .state_file import load_state, save_state
from .trainer import Trainer, TrainerState

_TRAINER_FILE = "trainer.safetensors"
_WRAPPER = "model."  # of trace.packing.PackedModel


def save_model(trainer: Trainer, folder: Path) -> Path:
    """Write model and tokenizer to a folder, whole or not at all; adapters are merged."""
    weights = _student_weights(trainer)
    if trainer.ranks.first:
        _publish(folder, lambda temporary: _write_model(trainer, temporary, weights, merge=True))
    return folder


def save_checkpoint(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write `folder/step-NNNNN`, whole or not at all; only the newest `keep` stay.

    Every rank has to call; the first writes.

    Raises:
        InputError: it could not be written (no space, no permission); the older ones are whole.
    """
    target = folder / f"step-{trainer.state.step:05d}"
    weights = _student_weights(trainer)
    state = {
        "optimizer": whole_optimizer(trainer.student, trainer.optimizer),
        "teacher": whole_weights(trainer.teacher) if trainer.teacher is not None else None,
        "state": asdict(trainer.state),
        "rng": _rng_states(),
    }
    if not trainer.ranks.first:
        return target

    def write(temporary: Path) -> None:
        _write_model(trainer, temporary, weights, merge=False)
        save_state(state, temporary / _TRAINER_FILE)

    _publish(target, write)
    prune_checkpoints(folder, keep)
    return target


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run, each whole or not at all."""
    for old in sorted(folder.glob("step-*"), key=_step)[:-keep]:
        # A kill in the middle leaves what no one takes for a checkpoint.
        shutil.rmtree(old.rename(_temporary(old)))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run, if any."""
    return max(folder.glob("step-*"), key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Put a trainer back where a checkpoint was written: weights, optimiser, teacher, state, RNGs."""
    model = trainer.policy.model
    if has_adapters(model):
        load_adapters(model, checkpoint)
    else:
        dtype = next(trainer.student.parameters()).dtype
        trusted = trainer.config.policy.trust_remote_code
        saved_model = load_model(str(checkpoint), dtype, trusted)
        weights = {_WRAPPER + name: value for name, value in saved_model.state_dict().items()}
        load_weights(trainer.student, weights)
    saved = load_state(checkpoint / _TRAINER_FILE)
    load_optimizer(trainer.student, trainer.optimizer, saved["optimizer"])
    trainer.state = TrainerState(**saved["state"])
    trainer.restore_identity()
    if saved["teacher"] is None:
        trainer.teacher = None
    else:
        assert trainer.teacher is not None, "a run with λ > 0 begins with a teacher"
        load_weights(trainer.teacher, saved["teacher"])
    _restore_rng_states(saved["rng"])


def _write_model(
    trainer: Trainer, folder: Path, weights: dict[str, torch.Tensor], merge: bool
) -> None:
    """Model and tokenizer; of a policy with adapters the merged model, or the adapters alone."""
    model = trainer.policy.model
    if not has_adapters(model):
        model.save_pretrained(folder, state_dict=weights)
    elif merge:
        save_merged(model, folder, weights)
    else:
        save_adapters(model, folder, weights)
    trainer.policy.tokenizer.save_pretrained(folder)


def _student_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The student's whole state dict under its model's own names, shared tensors once."""
    weights = {
        name.removeprefix(_WRAPPER): value for name, value in whole_weights(trainer.student).items()
    }
    # Gathered from shards, tensors that are tied come as copies.
    for tied in transformers_model(trainer.policy.model).all_tied_weights_keys:
        weights.pop(tied, None)
    return weights


def _rng_states() -> dict[str, Any]:
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


def _restore_rng_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder and put it in the target's place; leftovers of a kill are swept."""
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(".tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        write(temporary)
        # Power may fail as well: the name must not be on the disk before what it stands for.
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch.save hides the file system's error behind one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise InputError(
            f"{target}: could not be written ({cause}); make room there and give the same command "
            "again, it goes on from the newest checkpoint"
        ) from None
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)  # noqa: PTH105 - atomic on POSIX
    sync(target.parent)


def _temporary(target: Path) -> Path:
    return target.parent / f".tmp-{target.name}"
