"""Checkpoints of a training, written while it goes on, and the final model.

Stage train calls `resume`, `CheckpointWriter` (in pipelines/training/loop.py) and `save_model`.

step-00050/  shards/        weights, optimiser states, teacher: each rank's own (saved_run.py)
             trainer.json   counters, random states
             config.json tokenizer.json …
             adapter/       when adapters are trained: for peft and vLLM
             SHA256SUMS     of all of these; written last

A run resumes under another number of ranks. A checkpoint is no model folder: export.py makes one. A
damaged checkpoint is renamed to damaged-step-NNNNN, and training resumes from the one before.
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..schemas.errors import InputError
from .folders import (
    AGAIN,
    FAILURES,
    begin_folder,
    finish_folder,
    temporary_folder,
    unwritten,
    write_folder,
)
from .identity import TRAINER_FILE, checksums, write_checksums
from .lora import gathered_adapters, has_adapters, plain_weights, save_adapters
from .model_folder import write_settings, write_weights
from .retention import (
    DAMAGED,
    NAME,
    checkpoints,
    difference,
    prune_checkpoints,
    require_this_format,
    step_of,
)
from .saved_run import SHARDS, read_run, run_record, run_tensors
from .shards import Tensors, shards_of, staged, write_shards
from .trainer import Trainer

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
_MEND = f"{AGAIN}, which resumes from the newest checkpoint"


class CheckpointWriter:
    """Writes checkpoints of a trainer in a thread, one at a time. Every rank makes one and calls.

    `save` copies what this rank holds to the CPU and returns; the thread writes the copy. The
    threads of the ranks have a process group of their own, apart from the training's collectives.
    """

    def __init__(self, trainer: Trainer, folder: Path, keep: int = 2) -> None:
        """Checkpoints are `folder/step-NNNNN`; the newest `keep` stay."""
        self._trainer, self._folder, self._keep = trainer, folder, keep
        ranks = trainer.ranks
        self._group: dist.ProcessGroup | None = None
        if ranks.count > 1:
            ranks.wait()  # the first had its engines to open
            limit = timedelta(hours=trainer.config.wait_hours)
            group = dist.new_group(backend="gloo", timeout=limit)
            assert isinstance(group, dist.ProcessGroup), "every rank is a member"
            self._group = group
        self.written = trainer.state.step  # step of the newest checkpoint on disk
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint begun last could not be written; `wait` and `save` raise it."""
        return self._error is not None

    def save(self) -> Path:
        """Begin the checkpoint of the trainer's step, after the one before is written.

        Raises:
            InputError: this one or the one before could not be written (no space, no permission);
                older ones are untouched.
        """
        self.wait()
        trainer, ranks = self._trainer, self._trainer.ranks
        target = self._folder / f"step-{trainer.state.step:05d}"
        adapters = has_adapters(trainer.policy.model)
        gathered = gathered_adapters(trainer.policy.model) if adapters else None
        reason = None
        if ranks.first:
            try:
                _write_small_files(trainer, begin_folder(target), gathered)
            except FAILURES as error:
                reason = str(unwritten(target, error, _MEND))
        if (reason := ranks.broadcast(reason)) is not None:
            raise InputError(reason)
        tensors = staged(run_tensors(trainer))
        # A daemon: the second Ctrl-C ends the process without the checkpoint.
        self._thread = threading.Thread(target=self._write, args=(target, tensors), daemon=True)
        self._thread.start()
        return target

    def wait(self) -> None:
        """Until the checkpoint begun last is on disk.

        Raises:
            InputError: as `save`, on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, target: Path, tensors: Tensors) -> None:
        ranks, temporary = self._trainer.ranks, temporary_folder(target)
        try:
            write_shards(tensors, temporary / SHARDS, ranks.count, self._group)
            del tensors
            own = [f"{SHARDS}/{name}" for name in shards_of(temporary / SHARDS, ranks.index)]
            found = self._agree(lambda: checksums(temporary, own))
            known = {name: digest for part in found for name, digest in part.items()}
            self._agree(lambda: self._publish(target, known) if ranks.first else None)
            self.written = step_of(target)
        except FAILURES as error:
            if ranks.first:
                self._error = unwritten(target, error, _MEND)
            else:
                self._error = InputError(f"{target}: could not be written ({error}); {_MEND}")
        except BaseException as error:
            self._error = error

    def _publish(self, target: Path, known: dict[str, str]) -> None:
        write_checksums(temporary_folder(target), known)
        finish_folder(target)
        prune_checkpoints(target, self._keep)

    def _agree(self, work: Callable[[], Any]) -> list[Any]:
        """Each rank's result of its work. Raises OSError on every rank if one of them failed."""
        result = reason = None
        try:
            result = work()
        except FAILURES as error:
            if self._group is None:
                raise
            reason = str(error)
        if self._group is None:
            return [result]
        everyone: list[Any] = [None] * self._trainer.ranks.count
        dist.all_gather_object(everyone, (result, reason), group=self._group)
        for _, found in everyone:
            if found is not None:
                raise OSError(found)
        return [result for result, _ in everyone]


def save_checkpoint(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write one checkpoint and wait for it; see `CheckpointWriter`. Every rank has to call."""
    writer = CheckpointWriter(trainer, folder, keep)
    target = writer.save()
    writer.wait()
    return target


def save_model(trainer: Trainer, folder: Path) -> Path:
    """Write model and tokenizer as a transformers folder, atomically; adapters are merged, and
    stand in `adapter/` too. Weights have the type in which the trainer holds them.

    Every rank has to call; tensors are gathered one at a time, and the first rank writes.

    Raises:
        InputError: it could not be written, on every rank.
    """
    policy, ranks = trainer.policy, trainer.ranks
    gathered = gathered_adapters(policy.model) if has_adapters(policy.model) else None
    weights = plain_weights(policy.model)

    def write(temporary: Path) -> None:
        write_settings(policy.model, policy.tokenizer, temporary)
        write_weights(policy.model, weights, temporary)
        if gathered is not None:
            save_adapters(policy.model, temporary / ADAPTER, gathered)

    reason = None
    if ranks.first:
        try:
            write_folder(folder, write, _MEND)
        except InputError as error:
            reason = str(error)
    for _ in weights:  # gathering takes all ranks, also after an error
        pass
    if (reason := ranks.broadcast(reason)) is not None:
        raise InputError(reason)
    return folder


def resume(trainer: Trainer, folder: Path) -> Path | None:
    """Restore the newest sound checkpoint of a run and return it; None: there is none.

    Every rank has to call. Damaged checkpoints are logged and renamed.

    Raises:
        InputError: a checkpoint is of an older version.
    """
    ranks = trainer.ranks
    candidates = ranks.broadcast(_candidates(folder) if ranks.first else None)
    for checkpoint in candidates:
        require_this_format(checkpoint)
    for checkpoint in candidates:
        saved = None
        reason = _first(ranks.gather(difference(checkpoint, share=(ranks.index, ranks.count))))
        if reason is None:
            try:
                saved = read_run(trainer, checkpoint, step_of(checkpoint))
            except InputError as error:
                reason = str(error)
            # All ranks restore a checkpoint, or none does.
            reason = _first(ranks.gather(reason))
        if reason is None:
            assert saved is not None
            saved.apply(trainer)
            return checkpoint
        trainer.optimizer.state.clear()
        if ranks.first:
            last = checkpoint == candidates[-1]
            how = "from the start" if last else "from the one before"
            _set_aside(checkpoint, reason, how)
    return None


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Restore weights, optimiser, teacher, counters and random states from a checkpoint.

    Raises:
        InputError: the checkpoint is damaged; the trainer's weights are unchanged.
    """
    require_this_format(checkpoint)
    if (reason := difference(checkpoint)) is not None:
        raise InputError(f"{checkpoint}: is damaged ({reason}); take another checkpoint")
    read_run(trainer, checkpoint, step_of(checkpoint)).apply(trainer)


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


def _write_small_files(trainer: Trainer, folder: Path, adapters: Tensors | None) -> None:
    """All files of a checkpoint but the shards and the checksums."""
    policy = trainer.policy
    if adapters is None:
        write_settings(policy.model, policy.tokenizer, folder)
    else:
        policy.tokenizer.save_pretrained(folder)
        save_adapters(policy.model, folder / ADAPTER, adapters)
    (folder / TRAINER_FILE).write_text(json.dumps(run_record(trainer)) + "\n")


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
