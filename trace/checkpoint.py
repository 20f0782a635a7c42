"""Checkpoints: a transformers model folder, and beside it what a resumed run needs.

step-00050/  config.json model.safetensors tokenizer.json …   AutoModelForCausalLM, vLLM
             trainer.pt                                         optimiser, teacher, state
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .policy import Policy
from .trainer import Trainer, TrainerState

_TRAINER_FILE = "trainer.pt"


def save_model(policy: Policy, folder: Path) -> Path:
    """Write model and tokenizer to a folder, whole or not at all."""
    temporary = _temporary(folder)
    _write_model(policy, temporary)
    return _publish(temporary, folder)


def save_checkpoint(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write `folder/step-NNNNN`, whole or not at all; only the newest `keep` stay."""
    target = folder / f"step-{trainer.state.step:05d}"
    temporary = _temporary(target)
    _write_model(trainer.policy, temporary)
    torch.save(
        {
            "optimizer": trainer.optimizer.state_dict(),
            "teacher": trainer.teacher.state_dict() if trainer.teacher is not None else None,
            "state": asdict(trainer.state),
        },
        temporary / _TRAINER_FILE,
    )
    _publish(temporary, target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run, if any."""
    return max(folder.glob("step-*"), default=None)


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Put a trainer back where a checkpoint was written: weights, optimiser, teacher, state."""
    weights = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=trainer.policy.model.dtype)
    trainer.policy.model.load_state_dict(weights.state_dict())
    saved = torch.load(
        checkpoint / _TRAINER_FILE, map_location=trainer.policy.device, weights_only=True
    )
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.state = TrainerState(**saved["state"])
    trainer.restore_identity()
    if saved["teacher"] is not None:
        trainer.set_teacher(saved["teacher"])


def _write_model(policy: Policy, folder: Path) -> None:
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _temporary(target: Path) -> Path:
    """A fresh folder beside the target; leftovers of a killed run are swept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary = target.parent / f".tmp-{target.name}"
    temporary.mkdir()
    return temporary


def _publish(temporary: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)  # noqa: PTH105 - atomic on POSIX
    return target
