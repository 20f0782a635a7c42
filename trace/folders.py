"""Folders that appear under their name only when they are complete.

checkpoint.py and export.py write checkpoints and models with it: a temporary folder next to the
target is filled, synced and renamed. A kill leaves at most the temporary folder, which the next
writer removes. Imports no torch.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..data.atomic import sync
from ..schemas.errors import InputError

FAILURES = (OSError, SafetensorError)  # of writing and of reading files
AGAIN = "make room there and repeat the command"


def temporary_folder(target: Path) -> Path:
    return target.parent / f".tmp-{target.name}"


def begin_folder(target: Path) -> Path:
    """A new, empty temporary folder for a target; temporary folders of killed writers are removed.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    return temporary


def finish_folder(target: Path) -> None:
    """Sync the target's temporary folder and rename it; an older target is replaced.

    Raises:
        OSError: it cannot be synced or renamed.
    """
    temporary = temporary_folder(target)
    # After a power failure the name must not exist without its content, so sync first.
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    os.replace(temporary, target)  # noqa: PTH105 - atomic on POSIX
    sync(target.parent)


def write_folder(target: Path, write: Callable[[Path], None], mend: str = AGAIN) -> None:
    """Write a folder atomically: `write` fills the temporary one.

    Raises:
        InputError: it could not be written; nothing is left of it. mend: what to do then.
    """
    try:
        write(begin_folder(target))
        finish_folder(target)
    except FAILURES as error:
        raise unwritten(target, error, mend) from None


def unwritten(target: Path, error: BaseException, mend: str = AGAIN) -> InputError:
    """Remove what is written of a folder; the error to raise."""
    shutil.rmtree(temporary_folder(target), ignore_errors=True)
    return InputError(f"{target}: could not be written ({error}); {mend}")
