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

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ..schemas.contract import TableContract
from ..schemas.errors import DamagedFile, InputError
from .dataset import MANIFEST, Dataset, Draft, content_hash, now
from .files import sweep_siblings, write_whole
from .locks import locked, remove_unheld
from .remote import local_side, open_file_system, put_whole

__all__ = ["MANIFEST", "Dataset", "Draft", "Store", "content_hash"]

logger = logging.getLogger(__name__)

_ALIASES = "aliases.json"
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STAGE = re.compile(r"[a-z-]+")


class Store:
    """Datasets under one root. Safe to open many times; holds no state of its own."""

    def __init__(self, root: str | Path) -> None:
        self.fs, base = open_file_system(str(root))
        self.base = base.rstrip("/")
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
        """
        path = f"{stage}/{dataset_id}/{MANIFEST}"
        content = self._content(path)
        if content is None:
            return None
        try:
            return Dataset(self, stage, dataset_id, json.loads(content))
        except ValueError:
            raise DamagedFile(
                f"{self.url(path)}: does not hold what was written; remove it and give the command "
                "again that made it: it goes on from the parts"
            ) from None

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
        """All datasets that an alias, an id, a prefix of an id, or `stage/id` may mean."""
        target = self.aliases().get(ref, ref)
        stage, _, dataset_id = target.rpartition("/")
        named = _STAGE.fullmatch(stage) and dataset_id
        if named and (exact := self.find(stage, dataset_id)) is not None:
            return [exact]  # without a look at all others: on S3 that is requests for each
        return [
            dataset
            for dataset in self.datasets(stage or None)
            if dataset_id and dataset.id.startswith(dataset_id)
        ]

    def datasets(self, stage: str | None = None) -> Iterator[Dataset]:
        """All finished datasets, by stage and id; one with a damaged manifest is told and left out.

        None of a name that is no stage's: a path or a pattern leads nowhere.
        """
        if stage is not None and not _STAGE.fullmatch(stage):
            return
        for path in sorted(self.fs.glob(f"{glob.escape(self.base)}/{stage or '*'}/*/{MANIFEST}")):
            stage_name, dataset_id, _ = str(path).rsplit("/", 3)[-3:]
            try:
                dataset = self.find(stage_name, dataset_id)
            except DamagedFile as error:
                logger.warning("%s", error)
                continue
            if dataset is not None:
                yield dataset

    def lineage(self, dataset: Dataset) -> list[tuple[int, str, Dataset]]:
        """The dataset and all that it was made from: (depth, role, dataset), depth first.

        A dataset that is an input of several is listed once, where the walk first meets it.
        """
        out: list[tuple[int, str, Dataset]] = []
        seen: set[str] = set()

        def walk(node: Dataset, role: str, depth: int) -> None:
            out.append((depth, role, node))
            seen.add(node.ref)
            for child_role, ref in node.manifest["inputs"].items():
                if ref not in seen:
                    walk(self.get(ref), child_role, depth + 1)

        walk(dataset, "", 0)
        return out

    # --- aliases ---

    def aliases(self) -> dict[str, str]:
        content = self._content(_ALIASES)
        if content is None:
            return {}
        try:
            return json.loads(content)
        except ValueError:
            raise DamagedFile(
                f"{self.url(_ALIASES)}: does not hold what was written; remove it and name the "
                "datasets again (`trace-opd ls`, `trace-opd alias`)"
            ) from None

    def set_alias(self, name: str, dataset: Dataset) -> None:
        """Give a dataset a name, which leaves the dataset that had it.

        Of two that are given at once none is lost on a local store; elsewhere one may be.

        Raises:
            InputError: no name for an alias, or the store can't be written.
        """
        if not _ALIAS.fullmatch(name):
            raise InputError(f"alias {name!r}: use letters, digits, dot, dash and underscore")
        if self.aliases().get(name) == dataset.ref:
            # Nothing to write: a store that can't be written serves it too.
            if self.is_local:
                remove_unheld(self.local_root())
            return
        with self.locked(_ALIASES):
            self.write_json(_ALIASES, self.aliases() | {name: dataset.ref})
            if self.is_local:
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
        root = Path(self.base) if self.is_local else local_side(self.fs, self.base)
        return nullcontext() if root is None else locked(root, name, waits)

    def inside(self, path: str) -> str:
        """The full path of a file below the root.

        Raises:
            InputError: it leads out of the store, by `..` or by a symbolic link.
        """
        full = f"{self.base}/{path}"
        out = ".." in path.split("/")
        if self.is_local and not out:
            out = not Path(full).resolve().is_relative_to(Path(self.base).resolve())
        if out:
            raise InputError(
                f"store {self.root}: {path} leads out of it; put a copy in its place, or mend the "
                "manifest that names it"
            )
        return full

    def url(self, path: str) -> str:
        full = self.inside(path)
        return full if self.is_local else self.fs.unstrip_protocol(full)

    def local_root(self) -> Path:
        """The folder for files that are no table (journals, checkpoints, reports): the store's own,
        or if it is not local one below $TRACE_OPD_LOCAL.

        Raises:
            InputError: it is not local, and $TRACE_OPD_LOCAL is not set.
        """
        root = Path(self.base) if self.is_local else local_side(self.fs, self.base)
        if root is None:
            raise InputError(
                f"store {self.root}: files beside its tables (journals, checkpoints, reports) need "
                "a local folder; set TRACE_OPD_LOCAL to one that outlives this run"
            )
        return root

    def beside(self, path: str) -> Path:
        """Where a file that is no table lies, or a folder of such: below `local_root`.

        Raises:
            InputError: there is no local root, or the path leads out of the store.
        """
        self.inside(path)
        return self.local_root() / path

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
        """A small file's bytes by one request; None if it is not there."""
        try:
            return self.fs.cat_file(self.inside(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, path: str):
        try:
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
        """Write a file whole or not at all.

        Raises:
            InputError: no room, or not writable.
        """
        target = self.inside(path)
        if self.is_local:
            write_whole(Path(target), content)
            return
        put_whole(self.fs, target, content)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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
