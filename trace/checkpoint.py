"""Checkpoints: a transformers model folder plus the state that a resumed run needs.

Stage train calls `save_checkpoint`, `resume` and, at the end, `save_model`.

step-00050/  config.json model.safetensors tokenizer.json …   AutoModelForCausalLM, vLLM
             (adapter_config.json adapter_model.safetensors     peft, when adapters are trained)
             trainer.safetensors                                optimiser, teacher, state, RNGs
             SHA256SUMS                                         of all of these

Weights are stored unsharded, so a run may resume under another number of ranks. A damaged
checkpoint is renamed to damaged-step-NNNNN, and training resumes from the one before.
"""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..data.atomic import sync
from ..schemas.errors import InputError
from .identity import TRAINER_FILE, write_checksums
from .lora import has_adapters, save_adapters, save_merged, set_adapters, transformers_model
from .ranks import full_optimizer, full_weights, load_optimizer, load_weights
from .retention import (
    DAMAGED,
    NAME,
    checkpoints,
    difference,
    prune_checkpoints,
    step_of,
    temporary_folder,
)
from .saved_run import WRAPPER, SavedRun, read_run, restore_rng_states, rng_states, save_state
from .trainer import Trainer

logger = logging.getLogger(__name__)


def save_model(trainer: Trainer, folder: Path) -> Path:
    """Write model and tokenizer to a folder, atomically; adapters are merged into the weights.

    Every rank has to call; the first writes.
    """
    weights = _student_weights(trainer)
    if trainer.ranks.first:
        _publish(folder, lambda temporary: _write_model(trainer, temporary, weights, merge=True))
    return folder


def save_checkpoint(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write `folder/step-NNNNN` atomically; keep it and the `keep` - 1 before it.

    Every rank has to call; the first writes.

    Raises:
        InputError: it could not be written (no space, no permission); older ones are untouched.
    """
    target = folder / f"step-{trainer.state.step:05d}"
    weights = _student_weights(trainer)
    state = {
        "optimizer": full_optimizer(trainer.student, trainer.optimizer),
        "teacher": full_weights(trainer.teacher) if trainer.teacher is not None else None,
        "state": asdict(trainer.state),
        "rng": rng_states(),
        "checksums": True,
    }
    if not trainer.ranks.first:
        return target

    def write(temporary: Path) -> None:
        _write_model(trainer, temporary, weights, merge=False)
        save_state(state, temporary / TRAINER_FILE)
        write_checksums(temporary)

    _publish(target, write)
    prune_checkpoints(target, keep)
    return target


def resume(trainer: Trainer, folder: Path) -> Path | None:
    """Restore the newest sound checkpoint of a run and return it; None: there is none.

    Every rank has to call. Damaged checkpoints are logged and renamed.
    """
    ranks = trainer.ranks
    candidates = ranks.broadcast(_candidates(folder) if ranks.first else None)
    for checkpoint in candidates:
        saved = reason = None
        if ranks.first:
            reason = difference(checkpoint)
        reason = ranks.broadcast(reason)
        if reason is None:
            try:
                saved = read_run(trainer, checkpoint, step_of(checkpoint))
            except InputError as error:
                reason = str(error)
            # All ranks restore a checkpoint, or none does.
            reason = next((found for found in ranks.gather(reason) if found is not None), None)
        if reason is None:
            assert saved is not None
            _apply(trainer, saved)
            return checkpoint
        if ranks.first:
            last = checkpoint == candidates[-1]
            how = "from the start" if last else "from the one before"
            _set_aside(checkpoint, reason, how)
    return None


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Restore weights, optimiser, teacher, counters and random states from a checkpoint.

    Raises:
        InputError: the checkpoint is damaged; the trainer is unchanged.
    """
    if (reason := difference(checkpoint)) is not None:
        raise InputError(f"{checkpoint}: is damaged ({reason}); take another checkpoint")
    _apply(trainer, read_run(trainer, checkpoint, step_of(checkpoint)))


def _candidates(folder: Path) -> list[Path]:
    for path in sorted(folder.glob("step-*")):
        if not (NAME.fullmatch(path.name) and path.is_dir()):
            logger.warning("%s: is no checkpoint (a folder such as step-00050); ignored", path)
    return checkpoints(folder)


def _set_aside(checkpoint: Path, reason: str, how: str) -> None:
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    with suppress(OSError):  # the name only helps the user: every resume checks again
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint = checkpoint.rename(aside)
    logger.warning(
        "%s: this checkpoint is damaged (%s); training resumes %s", checkpoint, reason, how
    )


def _apply(trainer: Trainer, saved: SavedRun) -> None:
    """Load a saved run into the trainer. Every rank has to call: its modules may be sharded."""
    if has_adapters(trainer.policy.model):
        set_adapters(trainer.policy.model, saved.weights)
    else:
        load_weights(trainer.student, saved.weights)
    load_optimizer(trainer.student, trainer.optimizer, saved.optimizer)
    trainer.state = saved.state
    trainer.restore_identity()
    if saved.teacher is None:
        trainer.teacher = None
    else:
        assert trainer.teacher is not None, "read_run checks it"
        load_weights(trainer.teacher, saved.teacher)
    restore_rng_states(saved.rng)


def _write_model(
    trainer: Trainer, folder: Path, weights: dict[str, torch.Tensor], merge: bool
) -> None:
    """Write model and tokenizer; a policy with adapters writes the merged model, or adapters
    only.
    """
    model = trainer.policy.model
    if not has_adapters(model):
        model.save_pretrained(folder, state_dict=weights)
    elif merge:
        save_merged(model, folder, weights)
    else:
        save_adapters(model, folder, weights)
    trainer.policy.tokenizer.save_pretrained(folder)


def _student_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The student's unsharded state dict under its model's own names, tied tensors once."""
    weights = {
        name.removeprefix(WRAPPER): value for name, value in full_weights(trainer.student).items()
    }
    # Gathering from shards copies tied tensors.
    for tied in transformers_model(trainer.policy.model).all_tied_weights_keys:
        weights.pop(tied, None)
    return weights


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary folder, then rename it to the target; leftovers of a kill are removed."""
    temporary = temporary_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(".tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        write(temporary)
        # After a power failure the name must not exist without its content, so sync first.
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{target}: could not be written ({error}); make room there and repeat the command, "
            "which "
            "resumes from the newest checkpoint"
        ) from None
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    os.replace(temporary, target)  # noqa: PTH105 - atomic on POSIX
    sync(target.parent)
