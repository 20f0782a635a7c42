"""File faults of the soak: in a run by shim.c; between runs by flipped bits, cuts, leftover files
and links. Used by trial.py.
"""

import errno
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from trace_opd.data.files import is_temporary
from trace_opd.data.store import MANIFEST, Store

SHIM = Path(__file__).with_name("shim.c")
# Kind and errno (or signal number) as shim.c defines them.
IN_A_RUN = {
    "none": (0, 0),
    "io": (1, errno.EIO),
    "full": (2, errno.ENOSPC),
    "readonly": (2, errno.EROFS),
    "short": (3, 0),
    "unreadable": (4, errno.EIO),
    "sigkill": (5, signal.SIGKILL),
    "sigterm": (5, signal.SIGTERM),
    "sigint": (5, signal.SIGINT),
}
SIGNALS = ("sigkill", "sigterm", "sigint")


def build_shim(folder: Path) -> Path | None:
    """The library for LD_PRELOAD; None without a C compiler."""
    if shutil.which("gcc") is None:
        return None
    library = folder / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"]
    subprocess.run(command, check=True)
    return library


def listed(root: Path) -> set[Path]:
    """Files that the manifests of finished datasets list, and the manifests."""
    return {
        Path(dataset.path(name))
        for dataset in Store(root).datasets()
        for name in (MANIFEST, *(file["name"] for file in dataset.listed))
    }


def choose(root: Path, stage: str, at: float) -> Path | None:
    """A file of a stage's datasets, finished or not, that a later run will read."""
    found = [
        path
        for path in sorted(root.glob(f"{stage}/*/**/*"))
        if path.is_file()
        and not path.is_symlink()
        and path.stat().st_size
        and not is_temporary(path.name)
        and not any(is_temporary(part.name) for part in path.parents)
        and path.parent.name != "tensorboard"
    ]
    return found[int(at * len(found))] if found else None


def damage(path: Path, how: str, where: float) -> None:
    """Damage a file like a failing disk: flip a bit, cut the end off, or zero a block's rest."""
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    if how == "flip":
        content[place] ^= 1 << int(where * 1e6) % 8
    elif how == "cut":
        del content[place:]
    else:
        end = min(place + 512, len(content))
        content[place:end] = bytes(end - place)
    path.write_bytes(content)


def leave_stale(root: Path, folder: str, name: str) -> None:
    """Leave a temporary file like a killed writer."""
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half of someth")


@contextmanager
def link(path: Path, outside: Path, aside: Path) -> Iterator[None]:
    """Put a link that leads out of the store at a path; restore the original afterwards."""
    there = path.exists() or path.is_symlink()
    if there:
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_file = path.suffix or path.parent.name == ".locks"
    path.symlink_to(outside / ("file" if is_file else "folder"))
    try:
        yield
    finally:
        if path.is_symlink():
            path.unlink()
        if there:
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.rename(path)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_outside(folder: Path) -> None:
    """A folder next to the store that no run may change."""
    (folder / "folder" / "below").mkdir(parents=True)
    (folder / "file").write_text('{"verdicts": "verify/0123456789abcdef"}\n')
    for name in ("victim", "aliases.json", "part-00000.parquet", "below/manifest.json"):
        (folder / "folder" / name).write_text(f"{name} of somebody else\n")
    (folder / "folder" / "empty").touch()


def fingerprint(folder: Path) -> str:
    """Names, types, modes, times and contents of everything below a folder."""
    lines = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        about = path.lstat()
        content = sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        lines.append(f"{path.relative_to(folder)} {about.st_mode} {about.st_mtime_ns} {content}")
    return "\n".join(lines)
