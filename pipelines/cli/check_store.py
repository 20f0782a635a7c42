"""Whether a store holds what was written: each dataset's files against its manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.dataset import CHECKSUM, manifest_checksum
from ...data.files import is_temporary
from ...data.links import entries_in
from ...data.locks import holder
from ...data.manifest import is_ref, one_line
from ...data.store import MANIFEST, Dataset, Store
from ...schemas.errors import InputError
from ..progress import progress_bar
from ..stages import REGISTRY
from .remake import remake_commands


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
    whether all is as it was written.

    Raises:
        InputError: a ref that names no dataset.
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
    with progress_bar("verify-store", total, "files") as advance:
        for dataset in chosen:
            found += _manifest_faults(dataset)
            for listed in dataset.listed:
                found += _file_faults(dataset, listed)
                size += listed["bytes"]
                advance()
    if not refs:
        found += [*_lost_aliases(store), *_unfinished(store)]
    broken = [finding for finding in found if finding.state == "broken"]
    counted = f"{len(chosen)} datasets, {total} files, {size:,} bytes"
    said = f"{counted}: " + (f"{len(broken)} faults" if broken else "whole")
    commands = _commands(chosen, broken)
    return Group(*([_table(found)] if found else []), *commands, Text(said)), not broken


def _table(found: Sequence[Finding]) -> Table:
    table = Table("what", "state", "found", box=None)
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for finding in found:
        # A line break in a name would begin a line that looks like one of the commands below.
        table.add_row(one_line(finding.about), finding.state, one_line(finding.what))
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
        if not _is_there(dataset.store, ref):
            yield Finding(dataset.ref, "broken", f"its input {role}, {ref}, is gone")


def _is_there(store: Store, ref: str) -> bool:
    try:
        return store.exists(f"{ref}/{MANIFEST}")
    except InputError:  # a link
        return False


def _file_faults(dataset: Dataset, listed: dict[str, Any]) -> Iterator[Finding]:
    name = listed["name"]
    try:
        if not dataset.store.exists(f"{dataset.ref}/{name}"):
            yield Finding(dataset.ref, "broken", f"{name}: is gone", name)
            return
        size, digest = dataset.store.checksum(f"{dataset.ref}/{name}")
    except InputError as error:  # a link, or no regular file
        yield Finding(dataset.ref, "broken", str(error))
        return
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


def _lost_aliases(store: Store) -> Iterator[Finding]:
    try:
        aliases = store.aliases()
    except InputError as error:
        yield Finding("aliases", "broken", str(error))
        return
    for name, ref in aliases.items():
        if not _is_there(store, ref):
            what = f"names {ref}, which is not there; name another dataset: trace-opd alias"
            yield Finding(f"alias {name}", "broken", what)


def _unfinished(store: Store) -> Iterator[Finding]:
    """Datasets that are not finished, files that killed writers left, and links."""
    worked_on = set()
    for stage in (name for name, entry in REGISTRY.items() if entry.alias):
        for ref in (f"{stage}/{name}" for name in _names(store, stage)):
            if not is_ref(ref) or _is_there(store, ref):
                continue
            parts = sum(name.endswith(".parquet") for name in _names(store, ref))
            who = holder(store.local_root(), ref) if store.is_local else None
            if who is not None:
                worked_on.add(ref)
                what = f"{parts} parts so far; {who} makes it"
            else:
                what = f"{parts} parts; its command goes on from there"
            yield Finding(ref, "half-made", what)
    for name, is_link in _strangers(store):
        if is_link:
            what = "is a symbolic link, which nothing here follows; put a copy in its place"
            yield Finding(name, "broken", what)
        elif not any(name.startswith(f"{ref}/") for ref in worked_on):
            what = "never finished by a writer that was killed; the next success there removes it"
            yield Finding(name, "left over", what)


def _names(store: Store, folder: str) -> list[str]:
    try:
        return store.names(folder)
    except InputError:  # a link, which `_strangers` finds
        return []


def _strangers(store: Store) -> list[tuple[str, bool]]:
    """Paths below the root of links, and of files and folders that were never finished, topmost
    names alone; and whether it is a link."""
    root = f"{store.base}/"
    if store.is_local:
        paths = [(entry.path, entry.is_symlink()) for entry in entries_in(Path(store.base))]
    else:
        paths = [(str(path), False) for path in store.fs.find(store.base)]
    out = {}
    for path, is_link in paths:
        names = path.removeprefix(root).split("/")
        depth = next((depth for depth, name in enumerate(names, 1) if is_temporary(name)), None)
        if is_link or depth is not None:
            out["/".join(names[:depth])] = is_link and depth in (None, len(names))
    return sorted(out.items())
