"""What a store holds that nothing needs: `trace-opd gc` lists and removes it.

Datasets that no alias needs, checkpoints of finished runs, unfinished datasets and temporary files
that nobody has written to for a while. Answers that were paid for stay unless they are asked for.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ...data.atomic import is_temporary, sweep, sweep_siblings
from ...data.links import entries_in
from ...data.locks import any_held, holder
from ...data.removal import (
    Contents,
    Needed,
    check_unneeded,
    removable,
    remove_dataset,
    unfinished,
)
from ...data.store import Dataset, Store
from ...schemas.errors import InputError
from ...trace.retention import remove_checkpoint, unneeded_checkpoints

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # of fsspec's systems


@dataclass(frozen=True)
class Garbage:
    """what: a dataset or a path in the store. remove: does so, or raises Needed."""

    what: str
    why: str
    bytes: int
    remove: Callable[[], object]


def find_garbage(store: Store, older_than_s: float, paid: bool) -> list[Garbage]:
    """Everything that may go, so ordered that a dataset goes before what it was made from.

    older_than_s: age of unfinished datasets and temporary files; in a remote store, where a run on
    another machine holds no lock that is seen here, also of finished datasets. paid: take answers
    that were paid for too.

    Raises:
        InputError: a damaged manifest or damaged aliases, so what is needed is unknown.
    """
    held = Contents.of(store)
    unneeded = held.datasets.keys() - held.ancestors(held.aliases.values())
    if not store.files.is_local:
        young = {ref for ref in unneeded if _age_s(held.datasets[ref]) < older_than_s}
        unneeded -= held.ancestors(young)
    found = list(_datasets(store, held, unneeded, paid))
    for ref in sorted(held.datasets.keys() - unneeded):
        found += _checkpoints(store, held.datasets[ref])
    old = {ref for ref in unfinished(store) if _idle_s(store, ref) > older_than_s}
    found += _unfinished(store, held, old, paid)
    return found + list(_leftovers(store, older_than_s))


def _datasets(store: Store, held: Contents, refs: set[str], paid: bool) -> Iterator[Garbage]:
    def check() -> None:
        check_unneeded(store, held, refs)

    for ref in held.by_need(refs):
        taken, kept = removable(store.files, ref, paid)
        why = "no alias needs it" + ("; its paid answers stay" if kept else "")

        def remove(ref: str = ref) -> None:
            remove_dataset(store, ref, paid, check)

        yield Garbage(ref, why, sum(taken.values()), remove)


def _checkpoints(store: Store, run: Dataset) -> Iterator[Garbage]:
    if run.stage != "train" or run.manifest["config"].get("keep_checkpoints"):
        return
    try:
        folder = store.files.local_path(f"{run.ref}/checkpoints")
    except InputError:  # a remote store without its local folder
        return
    for checkpoint in unneeded_checkpoints(folder):
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

        def remove(checkpoint: Path = checkpoint) -> None:
            with store.files.locked(run.ref, _refuser(run.ref)):
                remove_checkpoint(checkpoint)

        what = f"{run.ref}/checkpoints/{checkpoint.name}"
        yield Garbage(what, "the run is finished", size, remove)


def _unfinished(store: Store, held: Contents, old: set[str], paid: bool) -> Iterator[Garbage]:
    """Unfinished datasets that nobody works on.

    A training that is not finished has tables that are not either, without a lock of their own: as
    long as one may go on, all tables stay.
    """
    runs = {ref for ref in unfinished(store) if ref.startswith("train/")}
    training = store.files.is_local and any_held(store.files.local_root(), "train/")
    if training or runs - old:
        old = {ref for ref in old if ref.startswith("train/")}
    for ref in sorted(old):
        if store.files.is_local and holder(store.files.local_root(), ref) is not None:
            continue
        taken, kept = removable(store.files, ref, paid)
        if kept and not taken:
            continue
        days = _idle_s(store, ref) / 86400
        why = f"unfinished for {days:.0f} days" + ("; its paid answers stay" if kept else "")

        def remove(ref: str = ref) -> None:
            remove_dataset(store, ref, paid, lambda: check_unneeded(store, held, {ref}))

        yield Garbage(ref, why, sum(taken.values()), remove)


def _leftovers(store: Store, older_than_s: float) -> Iterator[Garbage]:
    """Temporary files of killed writers: in finished datasets, and of the aliases."""
    files, now = store.files, time.time()
    if not files.is_local:
        for path, about in files.fs.find(files.base, detail=True).items():
            if is_temporary(path.rsplit("/", 1)[1]) and now - _written(about) > older_than_s:
                what = path.removeprefix(f"{files.base}/")
                unlink = partial(files.fs.rm_file, path)
                yield Garbage(what, "left by a killed writer", about.get("size") or 0, unlink)
        return
    root = files.local_root()
    for entry in entries_in(root):
        path = Path(entry.path).relative_to(root)
        ref = "/".join(path.parts[:2])
        about = entry.stat(follow_symlinks=False)
        if not is_temporary(entry.name) or now - about.st_mtime < older_than_s:
            continue
        if len(path.parts) > 2 and not files.exists(f"{ref}/manifest.json"):
            continue  # an unfinished dataset's
        if any(map(is_temporary, path.parts[:-1])):
            continue  # counted with its folder

        def remove(path: Path = path, ref: str = ref) -> None:
            if len(path.parts) > 2:
                with files.locked(ref, _refuser(ref)):
                    sweep(root / ref)
            else:
                sweep_siblings(root / path.with_name(path.name.split(".tmp-")[0]))

        size = about.st_size
        if entry.is_dir(follow_symlinks=False):
            inner = entries_in(Path(entry.path))
            size = sum(e.stat(follow_symlinks=False).st_size for e in inner if e.is_file())
        yield Garbage(str(path), "left by a killed writer", size, remove)


def _refuser(ref: str) -> Callable[[str], None]:
    def refuse(who: str) -> None:
        raise Needed(f"dataset {ref}: a run makes it ({who}); wait for its end")

    return refuse


def _age_s(dataset: Dataset) -> float:
    finished = datetime.fromisoformat(dataset.manifest["finished_at"])
    return (datetime.now(UTC) - finished).total_seconds()


def _idle_s(store: Store, ref: str) -> float:
    """Seconds since something was written in a dataset's folders; 0 where times are unknown."""
    newest: list[float] = []
    files = store.files
    if not files.is_local:
        newest += map(_written, files.fs.find(files.safe_path(ref), detail=True).values())
    try:
        folder = files.local_path(ref)
    except InputError:
        folder = None
    if folder is not None and folder.is_dir():
        newest += [folder.stat().st_mtime]
        newest += [entry.stat(follow_symlinks=False).st_mtime for entry in entries_in(folder)]
    return time.time() - max(newest, default=time.time())


def _written(about: dict[str, Any]) -> float:
    """The time of a remote file's last change; now if its file system does not say."""
    for name in _TIMES:
        match about.get(name):
            case datetime() as moment:
                return moment.timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case _:
                continue
    return time.time()
