"""Model folders that are made once per machine, atomically. smollm2.py and world.py call this."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ...data.atomic import sync, writing
from ...data.locks import locked

_ABANDONED_S = 3600  # longer than any of them takes


def prepared(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder of a model, made by one of the processes that ask for it at once.

    make: writes the model's files into an empty folder; config.json is one of them.

    Raises:
        InputError: the folder can't be written.
    """
    if is_made(folder):
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, folder.name), writing(folder):
        if is_made(folder):
            return folder
        _sweep(folder)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(draft)
            draft.chmod(0o755)  # mkdtemp makes it private to the user
            for path in (*draft.iterdir(), draft):  # durable before its name
                sync(path)
            try:
                draft.rename(folder)
            except OSError:  # not empty: without working locks another process may be first
                if not is_made(folder):
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def is_made(folder: Path) -> bool:
    """Whether a model is there: its folder gets its name when it is complete."""
    return (folder / "config.json").exists()


def _sweep(folder: Path) -> None:
    """Remove what killed processes left. Not all file systems have the lock, hence the age."""
    for draft in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - draft.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(draft, ignore_errors=True)
