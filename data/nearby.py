"""The sentence for a dataset that is not in a store: where it was looked for, and where it may be.

`Store.get`, `get_dataset` and the commands that show a store call this.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from .manifest import MANIFEST, is_ref, is_stage, read_aliases
from .store_files import StoreFiles

_ALIASES = "aliases.json"
_DEEPEST = 3  # levels below the working folder
_MOST_FOLDERS = 2000
_MOST_NAMED = 3
_CHOOSE = "choose another store by --store or TRACE_OPD_STORE"


def absent_dataset(
    files: StoreFiles, ref: str, aliases: Mapping[str, str], what: str = "dataset"
) -> str:
    """The sentence for a ref that names nothing in a store. aliases: the store's."""
    return f"{what} {ref!r} is not in store {described(files)}; {_advice(files, ref, aliases)}"


def described(files: StoreFiles) -> str:
    """A store's absolute path or URL, and whether it is empty."""
    where = files.url("").rstrip("/")
    if files.is_local and not Path(files.base).exists():
        return f"{where}, which does not exist yet"
    if files.is_local and not Path(files.base).is_dir():
        return f"{where}, which is no folder"
    if _is_empty(files):
        return f"{where}, which is empty"
    return where


def other_stores(files: StoreFiles, ref: str | None = None) -> str:
    """Which stores nearby hold a name (None: hold anything) and how to use one; "" if none does."""
    found = [
        folder for folder, names in _stores(files) if ref is None or _holds(folder, names, ref)
    ]
    if not found:
        return ""
    shown = [_shown(folder) for folder in found[:_MOST_NAMED]]
    verb = "holds" if len(found) == 1 else "hold"
    what = f"{verb} that name" if ref is not None else f"{verb} datasets"
    first = shown[0]
    return f"{', '.join(shown)} {what}: pass --store {first}, or set TRACE_OPD_STORE={first}"


def _advice(files: StoreFiles, ref: str, aliases: Mapping[str, str]) -> str:
    if held := other_stores(files, ref):
        return held
    if close := get_close_matches(ref, aliases, 1, 0.75):
        return f"did you mean {close[0]!r}? `trace-opd ls` lists what is there"
    if _is_empty(files) and (others := other_stores(files)):
        return others
    return f"`trace-opd ls` lists what is there, or {_CHOOSE}"


def _is_empty(files: StoreFiles) -> bool:
    return not any(map(is_stage, files.names()))


def _stores(files: StoreFiles) -> Iterator[tuple[Path, dict[str, str]]]:
    """Other local stores below the working folder and next to this one, with their aliases."""
    here = Path.cwd()
    waiting = [(here, _DEEPEST)]
    if files.is_local:
        waiting.append((Path(files.base).parent, 1))
    seen = {files.base}
    for _ in range(_MOST_FOLDERS):
        if not waiting:
            return
        folder, depth = waiting.pop(0)
        with suppress(OSError, ValueError):  # no permission, or another program's aliases.json
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            if str(folder) not in seen and (folder / _ALIASES).is_file():
                seen.add(str(folder))
                yield folder, read_aliases((folder / _ALIASES).read_bytes())[0]
            elif depth:
                inner = sorted(name for name in names if not name.startswith("."))
                waiting += [(folder / name, depth - 1) for name in inner]


def _holds(folder: Path, aliases: Mapping[str, str], ref: str) -> bool:
    target = aliases.get(ref, ref)
    return is_ref(target) and (folder / target / MANIFEST).is_file()


def _shown(folder: Path) -> str:
    """The path from the working folder if it is below it, else the absolute one."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
