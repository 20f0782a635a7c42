"""Which checkpoints a run keeps: their names, and the removal of those that it no longer needs.

checkpoint.py prunes older ones while a run trains. Stage train and `trace-opd gc` remove those of a
finished run. Imports no torch.
"""

import re
import shutil
from pathlib import Path

from ..schemas.errors import InputError
from .folders import temporary_folder
from .identity import CHECKSUMS, TRAINER_FILE, damage

NAME = re.compile(r"step-(\d{5,12})")
DAMAGED = "damaged-"
_OLD_STATE = "trainer.safetensors"
_ADAPTERS = "adapter"  # folder in peft's form


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints by name, newest first; `resume` checks whether they are sound."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune_checkpoints(newest: Path, keep: int) -> None:
    """Remove a run's older checkpoints, each atomically; keep `newest` and `keep` - 1 before it.

    newest: just written or just restored, so it is sound. Damaged checkpoints do not count, and
    stay.
    """
    older = [path for path in checkpoints(newest.parent) if step_of(path) < step_of(newest)]
    complete = [path for path in older if _is_complete(path)]
    for old in complete[keep - 1 :]:
        remove_checkpoint(old)


def unneeded_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that only a resumed run would read, so a finished run does not need them.

    The newest one with adapters stays: the final model holds them merged.
    """
    found = checkpoints(folder)
    if found and (found[0] / _ADAPTERS).exists():
        found = found[1:]
    removed = temporary_folder(folder / "step-*")  # by a run that was killed meanwhile
    found += [*folder.glob(f"{DAMAGED}step-*"), *folder.glob(removed.name)]
    return [path for path in found if not path.is_symlink()]


def remove_checkpoint(checkpoint: Path) -> None:
    """Renamed first: a kill during the removal leaves no partial checkpoint under its name."""
    if not checkpoint.name.startswith("."):
        checkpoint = checkpoint.rename(temporary_folder(checkpoint))
    shutil.rmtree(checkpoint)


def difference(checkpoint: Path, read: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """How a checkpoint differs from what was written (`identity.damage`); None if it does not."""
    for name in (TRAINER_FILE, CHECKSUMS):
        if not (checkpoint / name).exists():
            return f"{name} is missing"
    try:
        return damage(checkpoint, read, share)
    except OSError as error:
        return str(error)


def require_this_format(checkpoint: Path) -> None:
    """Raises InputError for a checkpoint of a version that wrote model folders."""
    if (checkpoint / _OLD_STATE).exists() and not (checkpoint / TRAINER_FILE).exists():
        raise InputError(
            f"{checkpoint}: was written by an older version of trace-opd; resume with that "
            f"version, or remove {checkpoint.parent} and start again"
        )


def _is_complete(checkpoint: Path) -> bool:
    return difference(checkpoint, read=False) is None
