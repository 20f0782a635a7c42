"""Removal of datasets from a store: what depends on them, what they take, and the removal itself.

`trace-opd rm` and `trace-opd gc` call this. A dataset becomes invisible when its manifest is
removed, and only then the rest goes, so a kill leaves a dataset or the parts of an unfinished one.
Its own lock keeps runs that make it away, and its lock `dataset.in_use` those that read it. Answers
that were paid for stay unless the caller asks for their removal.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..schemas.errors import InputError
from .atomic import sync
from .dataset import Dataset, find_dataset, in_use
from .links import entries_in
from .manifest import MANIFEST, is_ref, is_stage
from .owner import CLAIM, OWNER
from .store import Store
from .store_files import StoreFiles

PAID = ("journal", "batches")  # folders with answers that were paid for, or will be


class Needed(InputError):
    """A dataset that was to be removed is needed."""


def needs(dataset: Dataset) -> set[str]:
    """What a dataset refers to: its inputs, and the tables that a training's steps made."""
    return {*dataset.manifest["inputs"].values(), *dataset.summary.get("tables", {}).values()}


@dataclass(frozen=True)
class Contents:
    """A store's finished datasets and its aliases at one moment."""

    datasets: dict[str, Dataset]
    aliases: dict[str, str]

    @classmethod
    def of(cls, store: Store) -> "Contents":
        """Raises InputError for damaged aliases, or a damaged manifest: its inputs are unknown."""
        found = {}
        for ref, entry in store.entries():
            if not isinstance(entry, Dataset):
                raise InputError(
                    f"{entry}. Until then it is unknown what {ref} needs, and nothing is removed"
                )
            found[ref] = entry
        return cls(found, store.aliases())

    def names(self, ref: str) -> list[str]:
        return [name for name, named in self.aliases.items() if named == ref]

    def dependents(self, refs: Collection[str]) -> set[str]:
        """Datasets outside `refs` that need one of them."""
        chosen = set(refs)
        others = self.datasets.keys() - chosen
        return {ref for ref in others if needs(self.datasets[ref]) & chosen}

    def descendants(self, refs: Collection[str]) -> set[str]:
        """`refs` and everything that needs one of them, however far."""
        found = set(refs)
        while more := self.dependents(found):
            found |= more
        return found

    def ancestors(self, refs: Collection[str]) -> set[str]:
        """`refs` and everything that they need, however far."""
        found, waiting = set(), list(refs)
        while waiting:
            if (ref := waiting.pop()) not in found:
                found.add(ref)
                waiting += needs(self.datasets[ref]) if ref in self.datasets else ()
        return found

    def own_tables(self, refs: Collection[str]) -> set[str]:
        """Tables of the trainings in `refs` that nothing else needs and no alias names."""
        chosen = set(refs)
        tables = {
            table
            for ref in chosen & self.datasets.keys()
            for table in self.datasets[ref].summary.get("tables", {}).values()
        }
        tables &= self.datasets.keys() - set(self.aliases.values())
        while kept := {ref for ref in tables if self.dependents([ref]) - chosen - tables}:
            tables -= kept
        return tables - chosen

    def by_need(self, refs: Collection[str]) -> list[str]:
        """`refs` ordered so that each stands before what it needs."""
        ordered: list[str] = []
        rest = sorted(refs)
        while rest:
            free = [ref for ref in rest if not self.dependents([ref]) & set(rest)] or rest
            ordered += free
            rest = [ref for ref in rest if ref not in free]
        return ordered


def sizes(files: StoreFiles, ref: str) -> dict[str, int]:
    """Bytes of what lies in a dataset's folders, by the first name below them."""
    found: dict[str, int] = {}
    for folder in _local_folders(files, ref):
        for entry in entries_in(folder):
            if entry.is_file(follow_symlinks=False):
                name = Path(entry.path).relative_to(folder).parts[0]
                found[name] = found.get(name, 0) + entry.stat(follow_symlinks=False).st_size
        for name in folder.iterdir() if folder.is_dir() else ():
            found.setdefault(name.name, 0)
    if not files.is_local:
        root = files.safe_path(ref)
        for path, about in files.fs.find(root, detail=True).items():
            name = path.removeprefix(root).lstrip("/").split("/")[0]
            found[name] = found.get(name, 0) + (about.get("size") or 0)
    return found


def removable(files: StoreFiles, ref: str, paid: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What a removal takes and what it leaves, bytes by name. paid: take paid answers too."""
    found = sizes(files, ref)
    kept = {name: size for name, size in found.items() if name in PAID and size and not paid}
    if kept:  # the journal still belongs to this machine's folder
        kept |= {name: found[name] for name in (CLAIM, OWNER) if name in found}
    return {name: size for name, size in found.items() if name not in kept}, kept


def unfinished(store: Store) -> Iterator[str]:
    """The refs of folders without a manifest."""
    for stage in filter(is_stage, store.files.names()):
        for name in store.files.names(stage):
            if is_ref(f"{stage}/{name}") and not store.files.exists(f"{stage}/{name}/{MANIFEST}"):
                yield f"{stage}/{name}"


def remove_dataset(store: Store, ref: str, paid: bool, check: Callable[[], None]) -> int:
    """Remove a dataset, finished or not; return the bytes that it took.

    check: raises Needed if it must stay after all; called before, and again once the dataset is
    invisible, when no new user can find it. Then it is restored.

    Raises:
        Needed: `check` raised it, or a run makes or reads the dataset.
    """
    files = store.files

    def refuse(who: str) -> None:
        raise Needed(f"dataset {ref}: a run makes or reads it ({who}); wait for its end")

    with files.locked(ref, refuse), files.locked(in_use(ref), refuse):
        check()
        if (manifest := files.read(f"{ref}/{MANIFEST}")) is not None:
            files.remove(f"{ref}/{MANIFEST}")
            if files.is_local:
                sync(Path(files.safe_path(ref)))
            try:
                check()
            except BaseException:
                files.write(f"{ref}/{MANIFEST}", manifest)
                raise
        taken, kept = removable(files, ref, paid)
        for name in taken:
            _remove(files, f"{ref}/{name}")
        if not kept:
            for folder in _local_folders(files, ref):
                with suppress(OSError):  # not empty: a run began it meanwhile
                    folder.rmdir()
        return sum(taken.values()) + len(manifest or b"")


def check_unneeded(
    store: Store, before: Contents, removed: Collection[str], named: Collection[str] = ()
) -> None:
    """Compare the store with what it held: has anything in `removed` got a name or a dependent?

    named: aliases that may name them. Only manifests that are new since `before` are read.

    Raises:
        Needed: so it has.
    """
    for name, ref in store.aliases().items():
        if ref in removed and name not in named:
            raise Needed(f"dataset {ref}: {name} names it since a moment ago, so it stays")
    for stage in filter(is_stage, store.files.names()):
        for ref in (f"{stage}/{name}" for name in store.files.names(stage)):
            if ref in before.datasets or (new := find_dataset(store.files, ref)) is None:
                continue
            for needed in needs(new) & set(removed):
                raise Needed(f"dataset {needed}: {ref} needs it since a moment ago, so it stays")


def _local_folders(files: StoreFiles, ref: str) -> list[Path]:
    """The dataset's folder on this machine; none if a remote store has no local root."""
    try:
        return [files.local_path(ref)]
    except InputError:
        if files.is_local:
            raise
        return []


def _remove(files: StoreFiles, path: str) -> None:
    """Remove a file or folder of a dataset, here and in a remote store."""
    for local in _local_folders(files, path):
        if local.is_dir():
            shutil.rmtree(local)
        else:
            local.unlink(missing_ok=True)
    if not files.is_local and files.exists(path):
        files.fs.rm(files.safe_path(path), recursive=True)
