"""Check of a store: each dataset's files against its manifest, aliases, unfinished files, links.

`trace-opd verify-store` calls `check_store`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.atomic import is_temporary
from ...data.links import entries_in
from ...data.locks import holder
from ...data.manifest import CHECKSUM, is_ref, manifest_checksum, one_line
from ...data.store import MANIFEST, Dataset, Store
from ...data.store_files import StoreFiles
from ...schemas.errors import InputError
from ..progress import progress_bar
from ..stages import REGISTRY
from .remake import remake_commands


@dataclass(frozen=True)
class Finding:
    """A fault, or something unfinished.

    subject: a dataset, an alias or a path; state: broken, unfinished or leftover; file: the
    dataset's damaged file.
    """

    subject: str
    state: str
    text: str
    file: str | None = None


@dataclass(frozen=True)
class Check:
    """What was read and found. commands: those that make damaged datasets again."""

    datasets: int
    files: int
    bytes: int
    findings: list[Finding]
    commands: list[str]

    @property
    def broken(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == "broken"]

    @property
    def intact(self) -> bool:
        return not self.broken

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {"intact": self.intact} | asdict(self)

    def report(self) -> Group:
        """For the terminal."""
        report: list[Table | Text] = []
        if self.findings:
            table = Table("what", "state", "found", box=None)
            table.columns[0].overflow = table.columns[2].overflow = "fold"
            for one in self.findings:
                # On one line: a line break in a name could start a line like the commands below.
                table.add_row(one_line(one.subject), one.state, one_line(one.text))
            report.append(table)
        report += map(Text, self.commands)
        result = "intact" if self.intact else f"{len(self.broken)} faults"
        read = f"{self.datasets} datasets, {self.files} files, {self.bytes:,} bytes"
        return Group(*report, Text(f"{read}: {result}"))


def check_store(store: Store, refs: Sequence[str] = ()) -> Check:
    """Read the files that manifests list, of all datasets or of some.

    Raises:
        InputError: a ref names no dataset.
    """
    found: list[Finding] = []
    chosen = [store.get(ref) for ref in refs]
    if not refs:
        for ref, entry in store.entries():
            if isinstance(entry, Dataset):
                chosen.append(entry)
            else:
                found.append(Finding(ref, "broken", str(entry), MANIFEST))
    size = 0
    total = sum(len(dataset.listed) for dataset in chosen)
    with progress_bar("verify-store", total, "files") as progress:
        for dataset in chosen:
            found += _manifest_faults(dataset)
            for listed in dataset.listed:
                found += _file_faults(dataset, listed)
                size += listed["bytes"]
                progress.advance()
    if not refs:
        found += [*_lost_aliases(store), *_unfinished(store)]
    broken = [finding for finding in found if finding.state == "broken"]
    return Check(len(chosen), total, size, found, _commands(store, chosen, broken))


def _commands(store: Store, chosen: Sequence[Dataset], broken: Sequence[Finding]) -> list[str]:
    """Commands that make damaged datasets again; none for a damaged manifest."""
    damaged: dict[str, list[str]] = {}
    for finding in broken:
        if finding.file is not None:
            damaged.setdefault(finding.subject, []).append(finding.file)
    known = [(d, damaged[d.ref]) for d in chosen if d.ref in damaged]
    return remake_commands(store, [(d, files) for d, files in known if MANIFEST not in files])


def _manifest_faults(dataset: Dataset) -> Iterator[Finding]:
    recorded = dataset.manifest.get(CHECKSUM)
    if recorded is not None and recorded != manifest_checksum(dataset.manifest):
        text = (
            f"{MANIFEST}: differs from what was written; remove {dataset.path(MANIFEST)} and run "
            "the command again that made it: it continues from the parts"
        )
        yield Finding(dataset.ref, "broken", text, MANIFEST)
    for role, ref in dataset.manifest["inputs"].items():
        if not _is_there(dataset.files, ref):
            yield Finding(dataset.ref, "broken", f"its input {role}, {ref}, is missing")


def _is_there(files: StoreFiles, ref: str) -> bool:
    try:
        return files.exists(f"{ref}/{MANIFEST}")
    except InputError:  # a link
        return False


def _file_faults(dataset: Dataset, listed: dict[str, Any]) -> Iterator[Finding]:
    name = listed["name"]
    try:
        if not dataset.files.exists(f"{dataset.ref}/{name}"):
            yield Finding(dataset.ref, "broken", f"{name}: is missing", name)
            return
        size, digest = dataset.files.checksum(f"{dataset.ref}/{name}")
    except InputError as error:  # a link, or no regular file
        yield Finding(dataset.ref, "broken", str(error))
        return
    except OSError as error:  # an unreadable disk
        yield Finding(dataset.ref, "broken", f"{name}: {error.strerror}", name)
        return
    if size != listed["bytes"]:
        text = f"{name}: {size:,} bytes, {listed['bytes']:,} were written"
        yield Finding(dataset.ref, "broken", text, name)
    elif digest != listed["sha256"]:
        yield Finding(dataset.ref, "broken", f"{name}: differs from what was written", name)


def _lost_aliases(store: Store) -> Iterator[Finding]:
    try:
        aliases = store.aliases()
    except InputError as error:
        yield Finding("aliases", "broken", str(error))
        return
    for name, ref in aliases.items():
        if not _is_there(store.files, ref):
            text = f"names {ref}, which is missing; name another dataset: trace-opd alias"
            yield Finding(f"alias {name}", "broken", text)


def _unfinished(store: Store) -> Iterator[Finding]:
    """Datasets that are not finished, files that killed writers left, and links."""
    active = set()
    for stage in REGISTRY:
        for ref in (f"{stage}/{name}" for name in _names(store.files, stage)):
            if not is_ref(ref) or _is_there(store.files, ref):
                continue
            parts = sum(name.endswith(".parquet") for name in _names(store.files, ref))
            text = f"{parts} parts; its command continues from there"
            if store.files.is_local and (run := holder(store.files.local_root(), ref)) is not None:
                active.add(ref)
                text = f"{parts} parts so far; {run} makes it"
            yield Finding(ref, "unfinished", text)
    for name, is_link in _foreign_paths(store.files):
        if is_link:
            text = "is a symbolic link, which trace-opd does not follow; replace it by a copy"
            yield Finding(name, "broken", text)
        elif not any(name.startswith(f"{ref}/") for ref in active):
            text = "left by a killed writer; the next success there removes it"
            yield Finding(name, "leftover", text)


def _names(files: StoreFiles, folder: str) -> list[str]:
    try:
        return files.names(folder)
    except InputError:  # a link, which `_foreign_paths` finds
        return []


def _foreign_paths(files: StoreFiles) -> list[tuple[str, bool]]:
    """Topmost paths below the root of links and of unfinished files, and whether each is a link."""
    root = f"{files.base}/"
    if files.is_local:
        paths = [(entry.path, entry.is_symlink()) for entry in entries_in(Path(files.base))]
    else:
        paths = [(str(path), False) for path in files.fs.find(files.base)]
    out = {}
    for path, is_link in paths:
        names = path.removeprefix(root).split("/")
        depth = next((depth for depth, name in enumerate(names, 1) if is_temporary(name)), None)
        if is_link or depth is not None:
            out["/".join(names[:depth])] = is_link and depth in (None, len(names))
    return sorted(out.items())
