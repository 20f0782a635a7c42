"""The store: a folder, or any fsspec URL, of content-addressed datasets with lineage.

    <root>/<stage>/<dataset id>/part-00000.parquet …   written whole or not at all
    <root>/<stage>/<dataset id>/manifest.json          written last: its presence means "finished"
    <root>/aliases.json                                 names for ids
    <root>/.locks/                                      while runs work on datasets (local stores)
    <root>/.questions                                   annotators' claims on questions in flight
    <root>/.looks/                                      what a base answered, for all runs that begin with it

A dataset id is a hash of the stage, its semantic config and its inputs' ids, so the same request
finds the finished dataset, and a stage killed at any moment goes on from its finished parts.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ..schemas.contract import TableContract
from ..schemas.errors import DamagedFile, InputError
from . import lookup
from .dataset import MANIFEST, Dataset, Draft, content_hash, now
from .files import make_folders, sweep_siblings, sync, write_whole, writing
from .links import open_file, real_root, refuse_links, refuse_links_in
from .locks import locked, remove_unheld
from .manifest import LARGEST, is_alias, is_ref, one_line, read_aliases, read_manifest
from .remote import local_side, open_file_system, put_new, put_whole, update

__all__ = ["MANIFEST", "Dataset", "Draft", "Store", "content_hash"]

logger = logging.getLogger(__name__)

_ALIASES = "aliases.json"


class Store:
    """Datasets under one root. Safe to open many times; holds no state of its own."""

    def __init__(self, root: str | Path) -> None:
        """Raises InputError if no file system opens the root, or it is a link that leads nowhere."""
        self.fs, base = open_file_system(str(root))
        # Links in the root are followed here and once; below it none is.
        self.base = str(real_root(base)) if self.is_local else base.rstrip("/")
        self.root = str(root)

    # --- datasets ---

    def begin(
        self,
        stage: str,
        semantic: dict[str, Any],
        inputs: Mapping[str, Dataset | Draft],
        contract: TableContract | None,
        config: dict[str, Any] | None = None,
    ) -> Draft | Dataset:
        """The dataset of this request: finished if it is there, else a draft to go on with.

        Raises:
            InputError: the dataset is not there and the store cannot be written.
        """
        refs = {role: dataset.ref for role, dataset in inputs.items()}
        dataset_id = content_hash(
            {
                "stage": stage,
                "config": semantic,
                "inputs": refs,
                "version": contract.version if contract else 0,
            }
        )
        if (found := self.find(stage, dataset_id)) is not None:
            self.sync(found.ref)
            return found
        self._require_writable()
        header = {
            "stage": stage,
            "id": dataset_id,
            "table": contract.name if contract else None,
            "schema_version": contract.version if contract else None,
            "config": config if config is not None else semantic,
            "inputs": refs,
            "started_at": now(),
        }
        return Draft(self, stage, dataset_id, header, contract)

    def find(self, stage: str, dataset_id: str) -> Dataset | None:
        """The finished dataset, None if there is none.

        Raises:
            DamagedFile: its manifest does not hold what was written.
            InputError: a symbolic link leads to it.
        """
        if not is_ref(f"{stage}/{dataset_id}"):
            return None
        path = f"{stage}/{dataset_id}/{MANIFEST}"
        content = self._content(path)
        if content is None:
            return None
        try:
            manifest = read_manifest(content, stage, dataset_id)
        except ValueError as error:
            raise DamagedFile(
                f"{self.url(path)}: does not hold what was written ({one_line(str(error))}); remove it "
                "and give the command again that made it: it goes on from the parts"
            ) from None
        return Dataset(self, stage, dataset_id, manifest)

    def get(self, ref: str, table: TableContract | None = None) -> Dataset:
        """The dataset of an alias, an id, an unambiguous prefix of an id, or `stage/id`.

        Raises:
            InputError: nothing or more than one dataset answers, or it holds another table.
        """
        matches = self.matches(ref)
        if not matches:
            raise InputError(
                f"dataset {ref!r} is not in store {self.root}; `trace-opd ls` lists what is there"
            )
        if len(matches) > 1:
            raise InputError(
                f"dataset {ref!r} is ambiguous ({', '.join(d.ref for d in matches[:3])}); "
                "give more of the id"
            )
        (dataset,) = matches
        if table is not None:
            _check_table(dataset, table, ref)
        return dataset

    def matches(self, ref: str) -> list[Dataset]:
        """All datasets that an alias, an id, a prefix of an id, or `stage/id` may mean.

        Raises:
            DamagedFile: what it names, or the aliases, does not hold what was written.
        """
        return lookup.matches(self, ref)

    def datasets(self, stage: str | None = None) -> Iterator[Dataset]:
        """All finished datasets, by stage and id. One with a damaged manifest is logged and skipped.

        None of a name that is no stage's: a path or a pattern leads nowhere.
        """
        for _, dataset in self.entries(stage):
            if isinstance(dataset, Dataset):
                yield dataset
            else:
                logger.warning("%s", dataset)

    def entries(
        self, stage: str | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Dataset | InputError]]:
        """`stage/id` of every folder with a manifest: the dataset, or why it can't be read.

        prefix: of the ids.
        """
        return lookup.entries(self, stage, prefix)

    def names(self, folder: str = "") -> list[str]:
        """Names of what is in a folder of the store, sorted; [] if there is no such folder.

        Raises:
            InputError: the folder is a symbolic link.
        """
        path = self.inside(folder).rstrip("/")
        try:
            if self.is_local:
                return sorted(os.listdir(path))  # noqa: PTH208 - names alone
            return sorted(entry.rsplit("/", 1)[1] for entry in self.fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def lineage(self, dataset: Dataset) -> list[tuple[int, str, Dataset]]:
        """The dataset and all that it was made from: (depth, role, dataset), depth first.

        A dataset that is an input of several is listed once, where the walk first meets it. One that
        is gone or damaged is logged and skipped.
        """
        return lookup.lineage(self, dataset)

    # --- aliases ---

    def aliases(self) -> dict[str, str]:
        """Names with the `stage/id` that they name; an entry that is none is logged and skipped.

        Raises:
            DamagedFile: the file does not hold what was written.
        """
        return self._aliases_in(self._content(_ALIASES))

    def _aliases_in(self, content: bytes | None) -> dict[str, str]:
        if content is None:
            return {}
        try:
            good, bad = read_aliases(content)
        except ValueError as error:
            raise DamagedFile(
                f"{self.url(_ALIASES)}: does not hold what was written ({one_line(str(error))}); remove "
                "it and name the datasets again (`trace-opd ls`, `trace-opd alias`)"
            ) from None
        for name in bad:
            logger.warning("%s: skipped %r, which names no dataset", self.url(_ALIASES), name[:100])
        return good

    def set_alias(self, name: str, dataset: Dataset) -> None:
        """Give a dataset a name, which leaves the dataset that had it.

        Of two that are given at once none is lost, on a local store by a lock, on S3 by conditional
        writes; elsewhere one may be.

        Raises:
            InputError: no name for an alias, or the store can't be written.
        """
        if not is_alias(name):
            raise InputError(f"alias {name!r}: use letters, digits, dot, dash and underscore")
        if self.aliases().get(name) == dataset.ref:
            # Nothing to write: a store that can't be written serves it too.
            if self.is_local:
                remove_unheld(self.local_root())
                sync(self.local_root())  # its writer may have been killed before its own sync
            return
        self.sync(dataset.ref)
        with self.locked(_ALIASES):
            if not self.is_local:
                update(
                    self.fs,
                    self.inside(_ALIASES),
                    lambda content: _json(self._aliases_in(content) | {name: dataset.ref}),
                )
                return
            self.write_json(_ALIASES, self.aliases() | {name: dataset.ref})
            sweep_siblings(self.local_root() / _ALIASES)

    # --- files ---

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def locked(
        self, name: str, waits: Callable[[str], None] | None = None
    ) -> AbstractContextManager[None]:
        """One process at a time has the name (`locks.locked`); where the store is not local, of those
        that share $TRACE_OPD_LOCAL, and without that there is no lock."""
        root = self._local_root()
        return nullcontext() if root is None else locked(root, name, waits)

    def inside(self, path: str) -> str:
        """The full path of a file below the root.

        Raises:
            InputError: it leads out of the store by `..`, or a symbolic link is on it.
        """
        if ".." in path.split("/"):
            raise InputError(
                f"store {self.root}: {path} leads out of it; put a copy in its place, or mend the "
                "manifest that names it"
            )
        if self.is_local:
            refuse_links(Path(self.base), path)
        return f"{self.base}/{path}"

    def url(self, path: str) -> str:
        full = self.inside(path)
        return full if self.is_local else self.fs.unstrip_protocol(full)

    def local_root(self) -> Path:
        """The folder for files that are no table (journals, checkpoints, reports): the store's own,
        or if it is not local one below $TRACE_OPD_LOCAL. Use `beside` for a path below it.

        Raises:
            InputError: it is not local, and $TRACE_OPD_LOCAL is not set.
        """
        root = self._local_root()
        if root is None:
            raise InputError(
                f"store {self.root}: files beside its tables (journals, checkpoints, reports) need "
                "a local folder; set TRACE_OPD_LOCAL to one that outlives this run"
            )
        return root

    def _local_root(self) -> Path | None:
        if self.is_local:
            return Path(self.base)
        root = local_side(self.fs, self.base)
        return None if root is None else real_root(root)

    def beside(self, path: str) -> Path:
        """Where a file that is no table lies, or a folder of such: below `local_root`.

        Nothing on the path, and nothing in the folder, is a symbolic link: what works on files there
        may follow paths.

        Raises:
            InputError: there is no local root, the path leads out of the store, or there is a link.
        """
        self.inside(path)
        root = self.local_root()
        refuse_links(root, path)
        refuse_links_in(root / path)
        return root / path

    def folders_beside(self, stage: str, name: str) -> list[Path]:
        """The folders of that name of all datasets of a stage, finished or not (journals, batches);
        a dataset that holds links is logged and skipped."""
        found = []
        for path in sorted(self.local_root().glob(f"{stage}/*/{name}")):
            try:
                found.append(self.beside(f"{stage}/{path.parent.name}/{name}"))
            except InputError as error:
                logger.warning("%s", error)
        return found

    def _require_writable(self) -> None:
        """Says before work begins what its first part would run into; writes nothing."""
        if not self.is_local:
            return
        root = Path(self.base)
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"store {self.root}: {nearest} is no folder that can be written; pass --store with "
                "another path"
            )

    def exists(self, path: str) -> bool:
        return self.fs.exists(self.inside(path))

    def _content(self, path: str) -> bytes | None:
        """A small file's bytes by one request; None if it is not there.

        Raises:
            DamagedFile: it is no regular file, or can't be read.
        """
        try:
            if not self.is_local:
                return self.fs.cat_file(self.inside(path))
            with open_file(Path(self.base), path) as file:
                return file.read(LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if not self.is_local:
                raise
            raise DamagedFile(
                f"{self.url(path)}: can't be read ({error.strerror}); make it readable, or restore it"
            ) from None

    def open(self, path: str):
        try:
            if self.is_local:
                return open_file(Path(self.base), path)
            return self.fs.open(self.inside(path), "rb")
        except FileNotFoundError:
            raise InputError(
                f"{self.url(path)}: file is gone; `trace-opd verify-store` says how to make it "
                "again"
            ) from None

    def checksum(self, path: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file."""
        digest, size = hashlib.sha256(), 0
        with self.open(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def write(self, path: str, content: bytes) -> None:
        """Write a file atomically; on a local store it is on the disk when this returns.

        Raises:
            InputError: no room, or not writable.
        """
        target = self.inside(path)
        if self.is_local:
            with writing(target):
                make_folders(Path(target).parent, Path(self.base))
            write_whole(Path(target), content)
            return
        put_whole(self.fs, target, content)

    def create(self, path: str, content: bytes) -> bool:
        """Write a file of a store that is not local unless it is there; False if it is (`put_new`)."""
        return put_new(self.fs, self.inside(path), content)

    def sync(self, ref: str, files: Sequence[str] = ()) -> None:
        """Return when the names in a dataset's folder, and the content of some of its files, are on
        the disk: their writer may have been killed before its own sync. Local stores only."""
        if not self.is_local:
            return
        folder = Path(self.inside(ref))
        if not folder.is_dir():
            return
        with writing(folder):
            for path in (folder / name for name in files):
                sync(path)
                sync(path.parent)
                make_folders(path.parent, Path(self.base))
            make_folders(folder, Path(self.base))
            sync(folder)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError), writing(path):
            self.fs.rm_file(self.inside(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, _json(value))

    def create_json(self, path: str, value: Any) -> bool:
        return self.create(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_table(dataset: Dataset, table: TableContract, ref: str) -> None:
    held, held_version = dataset.manifest["table"], dataset.manifest["schema_version"]
    if held != table.name:
        raise InputError(
            f"dataset {ref!r} holds {held or 'no table'}, this stage needs table {table.name}; "
            "name a dataset of that stage"
        )
    if held_version != table.version:
        raise InputError(
            f"dataset {ref!r} is version {held_version} of table {table.name}, this release reads "
            f"version {table.version}; run its stage again"
        )
