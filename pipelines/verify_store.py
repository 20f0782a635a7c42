"""Whether a store holds what was written: each dataset's files against its manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..data.dataset import CHECKSUM, manifest_checksum
from ..data.files import is_temporary
from ..data.locks import holder
from ..data.store import MANIFEST, Dataset, Store
from ..schemas.errors import DamagedFile, InputError
from .remake import remake_commands
from .stage import progress_bar
from .stages import TABLE_STAGES


@dataclass(frozen=True)
class Finding:
    """Something about a dataset, an alias or a file.

    state: broken, half-made or left over. file: the dataset's damaged file, if it is one.
    """

    about: str
    state: str
    what: str
    file: str | None = None


def verify_store(store: Store, refs: Sequence[str] = ()) -> tuple[Group, bool]:
    """Read all that manifests list, or that of some datasets; what was found, for the terminal, and
    whether all is whole.

    Raises:
        InputError: a ref that names no dataset.
    """
    chosen = [store.get(ref) for ref in refs] or list(store.datasets())
    found: list[Finding] = []
    size = 0
    total = sum(len(dataset.listed) for dataset in chosen)
    with progress_bar("verify-store", total, "files") as advance:
        for dataset in chosen:
            found += _manifest_faults(dataset)
            for listed in dataset.listed:
                found += _file_faults(dataset, listed)
                size += listed["bytes"]
                advance()
    if not refs:
        found += [*_unreadable(store), *_lost_aliases(store), *_unfinished(store)]
    broken = [finding for finding in found if finding.state == "broken"]
    counted = f"{len(chosen)} datasets, {total} files, {size:,} bytes"
    said = f"{counted}: " + (f"{len(broken)} faults" if broken else "whole")
    commands = _commands(chosen, broken)
    return Group(*([_table(found)] if found else []), *commands, Text(said)), not broken


def _table(found: Sequence[Finding]) -> Table:
    table = Table("what", "state", "found", box=None)
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for finding in found:
        table.add_row(escape(finding.about), finding.state, escape(finding.what))
    return table


def _commands(chosen: Sequence[Dataset], broken: Sequence[Finding]) -> list[Text]:
    """Commands that make broken datasets again; none where the manifest is not to be trusted."""
    damaged: dict[str, list[str]] = {}
    for finding in broken:
        damaged.setdefault(finding.about, [])
        if finding.file is not None:
            damaged[finding.about].append(finding.file)
    known = [d for d in chosen if damaged.get(d.ref) and MANIFEST not in damaged[d.ref]]
    commands = remake_commands([(dataset, damaged[dataset.ref]) for dataset in known])
    return [Text(command) for command in commands]


def _manifest_faults(dataset: Dataset) -> Iterator[Finding]:
    told = dataset.manifest.get(CHECKSUM)
    if told is not None and told != manifest_checksum(dataset.manifest):
        yield _bad_manifest(dataset.store, dataset.ref)
    for role, ref in dataset.manifest["inputs"].items():
        stage, _, dataset_id = ref.partition("/")
        if not dataset.store.exists(f"{stage}/{dataset_id}/{MANIFEST}"):
            yield Finding(dataset.ref, "broken", f"its input {role}, {ref}, is gone")


def _file_faults(dataset: Dataset, listed: dict[str, Any]) -> Iterator[Finding]:
    name = listed["name"]
    if not dataset.store.exists(f"{dataset.ref}/{name}"):
        yield Finding(dataset.ref, "broken", f"{name}: is gone", name)
        return
    try:
        size, digest = dataset.store.checksum(f"{dataset.ref}/{name}")
    except OSError as error:  # a disk that can't read it any more
        yield Finding(dataset.ref, "broken", f"{name}: {error.strerror}", name)
        return
    if size != listed["bytes"]:
        what = f"{name}: {size:,} bytes, {listed['bytes']:,} were written"
        yield Finding(dataset.ref, "broken", what, name)
    elif digest != listed["sha256"]:
        yield Finding(dataset.ref, "broken", f"{name}: not the bytes that were written", name)


def _bad_manifest(store: Store, ref: str) -> Finding:
    what = (
        f"{MANIFEST}: not what was written; remove {store.url(f'{ref}/{MANIFEST}')} and give the "
        "command again that made it: it goes on from the parts"
    )
    return Finding(ref, "broken", what, MANIFEST)


def _unreadable(store: Store) -> Iterator[Finding]:
    for path in sorted(store.fs.glob(f"{store.base}/*/*/{MANIFEST}")):
        stage, dataset_id, _ = str(path).rsplit("/", 3)[-3:]
        try:
            store.find(stage, dataset_id)
        except DamagedFile:
            yield _bad_manifest(store, f"{stage}/{dataset_id}")


def _lost_aliases(store: Store) -> Iterator[Finding]:
    for name, ref in store.aliases().items():
        try:
            store.get(ref)
        except InputError:
            what = f"names {ref}, which is not there; name another dataset: trace-opd alias"
            yield Finding(f"alias {name}", "broken", what)


def _unfinished(store: Store) -> Iterator[Finding]:
    """Datasets that are not finished, and files that killed writers left."""
    temporary = _temporaries(store)
    worked_on = set()
    for stage in (*TABLE_STAGES, "train"):
        for path in sorted(store.fs.glob(f"{store.base}/{stage}/*")):
            ref = f"{stage}/{str(path).rsplit('/', 1)[1]}"
            if store.exists(f"{ref}/{MANIFEST}"):
                continue
            parts = len(store.fs.glob(f"{store.base}/{ref}/part-*.parquet"))
            parts -= sum(name.startswith(f"{ref}/part-") for name in temporary)
            who = holder(store.local_root(), ref) if store.is_local else None
            if who is not None:
                worked_on.add(ref)
                what = f"{parts} parts so far; {who} makes it"
            else:
                what = f"{parts} parts; its command goes on from there"
            yield Finding(ref, "half-made", what)
    for name in temporary:
        if not any(name.startswith(f"{ref}/") for ref in worked_on):
            what = "never finished by a writer that was killed; the next success there removes it"
            yield Finding(name, "left over", what)


def _temporaries(store: Store) -> list[str]:
    """Paths below the root of files and folders that were never finished, topmost names alone."""
    out = set()
    for path in store.fs.find(store.base):
        names = str(path).removeprefix(f"{store.base}/").split("/")
        for depth, name in enumerate(names):
            if is_temporary(name):
                out.add("/".join(names[: depth + 1]))
                break
    return sorted(out)
