"""A dataset of a store: finished, with a manifest, or a draft that a stage fills part by part.

`Store.begin` and `Store.get` return these; stages write drafts, everything else reads datasets.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..schemas.contract import TableContract, validate
from ..schemas.errors import InputError
from ..schemas.extras import require
from ..schemas.tables import CONTRACTS
from .atomic import make_folders, sweep, writing
from .dataset_html import dataset_html
from .manifest import MANIFEST, content_hash, finished_manifest, is_ref, now, read_manifest
from .nearby import absent_dataset
from .owner import claim
from .parts import count_rows, encoded, part_name, read_part
from .store_files import StoreFiles, as_json

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)


def dataset_id(
    stage: str,
    semantic: dict[str, Any],
    inputs: "Mapping[str, Dataset | Draft]",
    contract: TableContract | None,
) -> str:
    """A hash of what determines a dataset: stage, semantic config, inputs and schema version."""
    refs = {role: dataset.ref for role, dataset in inputs.items()}
    version = contract.version if contract else 0
    return content_hash({"stage": stage, "config": semantic, "inputs": refs, "version": version})


def find_dataset(files: StoreFiles, ref: str) -> "Dataset | None":
    """The finished dataset of a `stage/id`; None if there is none.

    Raises:
        DamagedFile: its manifest is damaged.
        InputError: its path holds a symbolic link.
    """
    path = f"{ref}/{MANIFEST}"
    if not is_ref(ref) or (content := files.read(path)) is None:
        return None
    stage, _, id_ = ref.partition("/")
    try:
        return Dataset(files, stage, id_, read_manifest(content, stage, id_))
    except ValueError as error:
        mend = "remove it and give the command again that made it: it goes on from the parts"
        raise files.damaged(path, error, mend) from None


def get_dataset(files: StoreFiles, ref: str) -> "Dataset":
    """As `find_dataset`, but raises InputError if there is none."""
    found = find_dataset(files, ref)
    if found is None:
        raise InputError(absent_dataset(files, ref, {}))
    return found


@dataclass(frozen=True, repr=False)
class Dataset:
    """A finished dataset: its manifest, and its parts, read on demand. Reading takes no lock."""

    files: StoreFiles
    stage: str
    id: str
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"Dataset({self.ref}, {self.rows} rows)"

    def _repr_html_(self) -> str:
        """What a notebook draws: the manifest's figures, and what the dataset was made from."""
        made_from = [(depth, role, node.ref, node.rows) for depth, role, node in self.lineage()]
        where = self.glob if self.parts else self.path()
        return dataset_html(self.manifest, self.rows, made_from[1:], where)

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
    def part_rows(self) -> tuple[int, ...]:
        """The rows of each part."""
        return tuple(part["rows"] for part in self.manifest["parts"])

    @property
    def contract(self) -> TableContract | None:
        return CONTRACTS.get(self.manifest["table"])

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest["summary"]

    @property
    def listed(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of every file of the dataset."""
        return self.manifest["parts"] + self.manifest.get("files", [])

    def path(self, name: str = "") -> str:
        """Path or URL of a file of the dataset; of its folder if no name is given."""
        return self.files.url(f"{self.ref}/{name}".rstrip("/"))

    @property
    def glob(self) -> str:
        """Pattern of all parts, for polars, DuckDB or pyarrow."""
        return self.path("part-*.parquet")

    def local_path(self, name: str) -> Path:
        """A folder of the dataset on this machine, downloaded first if the store is remote.

        Raises:
            InputError: the store is remote and has no local folder, or a name leaves the store.
        """
        folder = f"{self.ref}/{name}"
        path = self.files.local_path(folder)
        if not self.files.is_local and not path.exists():
            names = [file["name"] for file in self.listed]
            prefix = f"{name}/"
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            self.files.download(folder, inside)
        return path

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One part, checked against the table's contract unless columns are picked.

        Optional columns are left out where the part lacks them.

        Raises:
            InputError: it is gone; DamagedFile: its content is damaged.
        """
        return read_part(self.files, self.ref, index, self.contract, columns)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts as one table."""
        return pa.concat_tables(self.read_part(i, columns) for i in range(self.parts))

    def to_polars(self, columns: Sequence[str] | None = None) -> "pl.DataFrame":
        """All parts as one polars frame; `read` gives an Arrow table.

        Raises:
            InputError: the dataset has no table (a train run), or polars is not installed.
        """
        require("polars")
        import polars as pl

        if not self.parts:
            raise InputError(
                f"dataset {self.ref} has no table; its figures are in .summary, its files in "
                f"{self.path()}"
            )
        frame = pl.from_arrow(self.read(columns))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def input(self, role: str) -> "Dataset":
        """The dataset that was this one's input in a role (problems, rollouts, …)."""
        return get_dataset(self.files, self.manifest["inputs"][role])

    def lineage(self) -> "list[tuple[int, str, Dataset]]":
        """The dataset and everything it was made from: (depth, role, dataset), depth first.

        A dataset that is an input of several is listed once. A missing or damaged one is logged and
        skipped.
        """
        out: list[tuple[int, str, Dataset]] = []
        seen: set[str] = set()
        waiting = [(0, "", self.ref)]
        while waiting:
            depth, role, ref = waiting.pop()
            if ref in seen:
                continue
            seen.add(ref)
            try:
                node = self if depth == 0 else get_dataset(self.files, ref)
            except InputError as error:
                logger.warning("%s", error)
                continue
            out.append((depth, role, node))
            inputs = node.manifest["inputs"].items()
            waiting += [(depth + 1, name, child) for name, child in reversed(inputs)]
        return out


def in_use(ref: str) -> str:
    """The name of the lock that runs share on a dataset while they read it."""
    return f"{ref}.use"


def why_empty(dataset: Dataset) -> str:
    """Which dataset the rows of an empty one were lost at, and why, as far as its summary shows."""
    empty = [node for _, _, node in dataset.lineage() if node.manifest["table"] and not node.rows]
    refs = {node.ref for node in empty}
    # Made from datasets that have rows.
    first = next(node for node in empty if not refs & set(node.manifest["inputs"].values()))
    left_out = first.summary.get("left_out")
    why = "it was made without rows"
    if isinstance(left_out, dict) and left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        why = f"everything was left out ({reasons})"
    which = "" if first.ref == dataset.ref else f"so is {first.ref}, from which it was made; "
    return f"{which}{why}; make {first.ref} again so that it has rows"


@dataclass(frozen=True)
class Draft:
    """A dataset in the making: `write_part` adds parts, `finish` turns it into a Dataset."""

    files: StoreFiles
    stage: str
    id: str
    header: dict[str, Any]
    contract: TableContract | None
    began: float = field(default_factory=time.monotonic, compare=False)
    # The manifest's entries, by name, of the parts that this process wrote; and what the stage's
    # summary needs of each, by index.
    _written: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    digests: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ref(self) -> str:
        return f"{self.stage}/{self.id}"

    @contextmanager
    def locked(self, waits: Callable[[str], None]) -> "Iterator[Draft | Dataset]":
        """Hold the dataset while a run works on it; yields the Dataset if another run finished it.

        The process that began the draft holds the lock, its workers hold nothing. Runs on two
        machines with a remote store do not see each other: both make the parts, and the first
        writer of each part and of the manifest wins. Only one may have local files (`local_path`).

        waits: called with a line that names the holder, before this blocks; may raise.

        Raises:
            InputError: the store can't be written, or an input was removed (removal.py).
        """
        with ExitStack() as held:
            who = lambda who: waits(f"{self.ref} is being made by {who}")  # noqa: E731
            held.enter_context(self.files.locked(self.ref, who))
            inputs = set(self.header["inputs"].values())
            for ref in sorted(inputs):
                held.enter_context(self.files.locked(in_use(ref), shared=True))
            found = find_dataset(self.files, self.ref)
            if found is not None:
                self.files.sync(self.ref)
            elif self.files.is_local:  # elsewhere no removal sees the locks
                for ref in inputs:
                    get_dataset(self.files, ref)
            header = self.header | {"started_at": now()}
            yield found or replace(self, header=header, began=time.monotonic())

    def has_part(self, index: int) -> bool:
        return self.files.exists(f"{self.ref}/{part_name(index)}")

    def has_sound_part(self, index: int) -> bool:
        """Whether a part exists and reads in full. A damaged part is removed, to be made again.

        Called when a run resumes: no manifest holds a checksum of these parts yet. Parquet pages
        have checksums but the footer has none: if the file differs from its rows encoded again, it
        is rewritten from the rows.
        """
        path = f"{self.ref}/{part_name(index)}"
        if not self.has_part(index):
            return False
        try:
            content = encoded(self.read_part(index))
        except InputError as error:
            logger.warning("%s; it is removed and made again", error)
            self.files.remove(path)
            self._written.pop(part_name(index), None)
            self.digests.pop(index, None)
            return False
        if self.files.checksum(path) != (len(content), hashlib.sha256(content).hexdigest()):
            self.files.write(path, content)
        return True

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part that is already written."""
        return read_part(self.files, self.ref, index, self.contract, columns)

    def write_part(self, index: int, table: pa.Table, *, replace: bool = False) -> None:
        """Check a part against the contract, then write it atomically.

        In a remote store a part that another machine has written stays, because a manifest may list
        it already. replace: overwrite it.
        """
        name = part_name(index)
        path = f"{self.ref}/{name}"
        if self.contract is not None:
            table = validate(table, self.contract, path)
        content = encoded(table)
        if not self.files.is_local and not replace:
            self.files.create(path, content)
            return
        self.files.write(path, content)
        digest = hashlib.sha256(content).hexdigest()
        self._written[name] = {"rows": len(table)} | _entry(name, len(content), digest)

    def local_path(self, name: str = "") -> Path:
        """Local folder for files that are not tables (checkpoints, journals), made if needed.

        In a remote store the first such folder owns the dataset: another machine would pay for the
        same answers and train other weights under the same id.

        Raises:
            InputError: a remote store has no local folder, another folder owns the dataset, or the
                folder can't be written.
        """
        path = self.files.local_path(f"{self.ref}/{name}".rstrip("/"))
        with writing(path):
            make_folders(path, self.files.local_root())
        if not self.files.is_local:
            claim(self.files, self.ref)
        return path

    def finish(
        self, parts: int, summary: dict[str, Any] | None = None, files: Sequence[str] = ()
    ) -> Dataset:
        """Write the manifest, which makes the dataset visible.

        In a local store, files that killed writers left in the dataset's folder are removed first:
        the caller holds the lock. In a remote store an existing manifest of another machine stays
        and its dataset is returned: it lists the same parts, since the first writer of each part
        wins too.

        files: names of the dataset's files in `local_path()`; a remote store gets copies.
        """
        self.files.upload(self.ref, files)
        listed = [self._part_entry(name) for name in map(part_name, range(parts))]
        seconds = time.monotonic() - self.began
        manifest = finished_manifest(
            self.header, seconds, listed, [self._entry(name) for name in files], summary or {}
        )
        path, content = f"{self.ref}/{MANIFEST}", as_json(manifest)
        if self.files.is_local:
            sweep(self.files.local_path(self.ref))
            # Everything that the manifest names must be durable before the manifest.
            self.files.sync(self.ref, files)
            for ref in self.header["inputs"].values():
                self.files.sync(ref)
            self.files.write(path, content)
        elif not self.files.create(path, content):
            return get_dataset(self.files, self.ref)
        return Dataset(self.files, self.stage, self.id, manifest)

    def _part_entry(self, name: str) -> dict[str, Any]:
        path = f"{self.ref}/{name}"
        if name in self._written and self.files.exists(path):
            return self._written[name]
        return {"rows": count_rows(self.files, path)} | self._entry(name)

    def _entry(self, name: str) -> dict[str, Any]:
        return _entry(name, *self.files.checksum(f"{self.ref}/{name}"))


def _entry(name: str, size: int, digest: str) -> dict[str, Any]:
    """A file in the manifest."""
    return {"name": name, "bytes": size, "sha256": digest}
