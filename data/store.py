"""The store: content-addressed datasets with lineage below a folder or any fsspec URL.

    <root>/<stage>/<dataset id>/part-00000.parquet …   written atomically
    <root>/<stage>/<dataset id>/manifest.json          written last: it makes the dataset visible
    <root>/aliases.json                                 names of datasets
    <root>/.locks/                                      locks of running commands (local stores)
    <root>/.questions                                   annotators' claims on questions in flight
    <root>/.looks/                                      evaluations of base models, shared by runs

A dataset id is a hash of the stage, its semantic config and its inputs' ids. So the same request
finds the finished dataset, and a stage killed at any moment resumes from its finished parts. Every
stage and command opens a `Store`.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..schemas.aliases import require_alias
from ..schemas.contract import TableContract
from ..schemas.errors import DamagedFile, InputError
from .dataset import Dataset, Draft, dataset_id, find_dataset, why_empty
from .locks import remove_unheld
from .manifest import MANIFEST, content_hash, is_ref, is_stage, now, read_aliases
from .nearby import absent_dataset
from .store_files import StoreFiles, as_json

__all__ = ["MANIFEST", "Dataset", "Draft", "Store", "content_hash"]

logger = logging.getLogger(__name__)

_ALIASES = "aliases.json"


class Store:
    """Datasets and aliases below one root. Holds no state but the root."""

    def __init__(self, root: str | Path) -> None:
        """Raises InputError if no file system opens the root, or it is a dangling link."""
        self.files = StoreFiles(root)
        self.root = self.files.root

    # --- datasets ---

    def begin(
        self,
        stage: str,
        semantic: dict[str, Any],
        inputs: Mapping[str, Dataset | Draft],
        contract: TableContract | None,
        config: dict[str, Any] | None = None,
    ) -> Draft | Dataset:
        """The dataset of a request if it is finished, else a draft to fill.

        semantic: the part of the config that determines the result; config: what the manifest
        records, by default `semantic`.

        Raises:
            InputError: the dataset is not finished and the store can't be written.
        """
        id_ = dataset_id(stage, semantic, inputs, contract)
        if (found := find_dataset(self.files, f"{stage}/{id_}")) is not None:
            self.files.sync(found.ref)
            return found
        self.files.require_writable()
        header = {
            "stage": stage,
            "id": id_,
            "table": contract.name if contract else None,
            "schema_version": contract.version if contract else None,
            "config": config if config is not None else semantic,
            "inputs": {role: dataset.ref for role, dataset in inputs.items()},
            "started_at": now(),
        }
        return Draft(self.files, stage, id_, header, contract)

    def get(self, ref: str, table: TableContract | None = None) -> Dataset:
        """The dataset of an alias, an id, an unambiguous prefix of an id, or `stage/id`.

        table: it has to hold this table, and a row.

        Raises:
            InputError: no dataset or several match, or the dataset holds another table or no row.
        """
        matches = self.matches(ref)
        if not matches:
            raise InputError(absent_dataset(self.files, ref, self.aliases()))
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
            DamagedFile: nothing matches, and the aliases or a matching manifest are damaged.
        """
        damaged: list[InputError] = []
        target = ref
        try:
            target = self.aliases().get(ref, ref)
        except InputError as error:
            damaged.append(error)
        # An exact reference needs no listing, which costs requests on S3.
        if (exact := find_dataset(self.files, target)) is not None:
            return [exact]
        stage, _, prefix = target.rpartition("/")
        found = []
        for _, dataset in self.entries(stage or None, prefix) if prefix else ():
            if isinstance(dataset, Dataset):
                found.append(dataset)
            else:
                damaged.append(dataset)
        if damaged and not found:
            raise damaged[-1]
        for error in damaged:
            logger.warning("%s", error)
        return found

    def datasets(self, stage: str | None = None) -> Iterator[Dataset]:
        """All finished datasets, by stage and id. Datasets with a damaged manifest are logged and
        skipped. A `stage` that is not a stage's name has no datasets."""
        for _, dataset in self.entries(stage):
            if isinstance(dataset, Dataset):
                yield dataset
            else:
                logger.warning("%s", dataset)

    def entries(
        self, stage: str | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Dataset | InputError]]:
        """`stage/id` of every folder with a manifest, with the dataset or why it can't be read.

        prefix: of the ids.
        """
        if stage is not None and not is_stage(stage):
            return
        for folder in [stage] if stage else filter(is_stage, self.files.names()):
            try:
                names = self.files.names(folder)
            except InputError as error:
                yield folder, error
                continue
            for name in names:
                if name.startswith(prefix) and (entry := self._entry(f"{folder}/{name}")):
                    yield f"{folder}/{name}", entry

    def _entry(self, ref: str) -> Dataset | InputError | None:
        if is_ref(ref):
            try:
                return find_dataset(self.files, ref)
            except InputError as error:
                return error
        path = f"{self.files.base}/{ref}"
        if not self.files.fs.lexists(f"{path}/{MANIFEST}"):
            return None
        return DamagedFile(f"{path!r}: is not a dataset id; rename it to the id in its manifest")

    # --- aliases ---

    def aliases(self) -> dict[str, str]:
        """The `stage/id` of each alias. Invalid entries are logged and skipped.

        Raises:
            DamagedFile: the file of aliases is damaged.
        """
        return self._parse_aliases(self.files.read(_ALIASES))

    def _parse_aliases(self, content: bytes | None) -> dict[str, str]:
        if content is None:
            return {}
        try:
            good, bad = read_aliases(content)
        except ValueError as error:
            mend = "remove it and name the datasets again (`trace-opd ls`, `trace-opd alias`)"
            raise self.files.damaged(_ALIASES, error, mend) from None
        for name in bad:
            logger.warning(
                "%s: skipped %r, which does not name a dataset",
                self.files.url(_ALIASES),
                name[:100],
            )
        return good

    def set_alias(self, name: str, dataset: Dataset) -> str | None:
        """Give a dataset a name and return the `stage/id` that had it; None if none had.

        Concurrent calls lose no alias in a local store or on S3 (`StoreFiles.update`).

        Raises:
            InputError: the name is not valid, the store can't be written, or the dataset was
                removed meanwhile.
        """
        require_alias(name)
        if self.aliases().get(name) == dataset.ref:
            # Nothing to write, so this works in a read-only store too. The process that wrote the
            # alias may have been killed before it synced the file and removed its lock.
            if self.files.is_local:
                remove_unheld(self.files.local_root())
            self.files.sync("")
            return dataset.ref
        self.files.sync(dataset.ref)
        former: str | None = None

        def change(content: bytes | None) -> bytes:
            nonlocal former
            names = self._parse_aliases(content)
            former = names.get(name)
            return as_json(names | {name: dataset.ref})

        self.files.update(_ALIASES, change)
        # A removal reads the aliases once the manifest is gone, so one of the two sees the other.
        if not self.files.exists(f"{dataset.ref}/{MANIFEST}"):
            raise InputError(
                f"dataset {dataset.ref} was removed while it was named {name}; give the same "
                "command again, which makes it again"
            )
        return former

    def drop_aliases(self, names: Collection[str]) -> None:
        """Remove names; the datasets stay. Concurrent calls: see `set_alias`."""

        def change(content: bytes | None) -> bytes:
            kept = self._parse_aliases(content)
            return as_json({name: ref for name, ref in kept.items() if name not in names})

        if set(names) & self.aliases().keys():
            self.files.update(_ALIASES, change)


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
    if not dataset.rows:
        raise InputError(f"dataset {ref!r} is empty: {why_empty(dataset)}")
