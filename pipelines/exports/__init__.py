"""Exports of routed tables: a registry from a format's name to its file.

`trace-opd export` calls `export_routed`. A format is one file with a `FORMAT`: what it writes, what
it keeps and loses of a routed table, and a generator of its files' contents, part by part.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ...schemas.errors import InputError
from ...trace.folders import temporary_folder, write_folder
from .format import Format, Options
from .source import open_source

__all__ = ["FORMATS", "Options", "export_routed", "format_of"]

if TYPE_CHECKING:
    from ...data.store import Store

# Name of a format and its file.
FORMATS = {
    "trl": "trl",
    "verl": "verl",
    "ms-swift": "ms_swift",
    "prime-rl": "prime_rl",
    "jsonl": "jsonl",
}


def format_of(name: str) -> Format:
    return import_module(f".{FORMATS[name]}", __package__).FORMAT


def export_routed(
    name: str, source: str, store: "Store", folder: Path, options: Options
) -> dict[str, int]:
    """Write a routed dataset in a format's form, atomically; returns the rows of each sub-folder.

    Equal datasets and options give equal bytes. No more than a part is in memory.

    Raises:
        InputError: no such dataset, an option that the format does not read, a table that it can't
            hold; the folder is there, or can't be written.
    """
    form = format_of(name)
    for option in ("policy", "scores", "groups_per_step"):
        if getattr(options, option) is not None and option not in form.reads:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag}: format {name} does not read it; leave it out")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; name a new folder")
    opened = open_source(store, source)
    rows: dict[str, int] = {}

    def write(temporary: Path) -> None:
        rows.clear()
        for file in form.files(opened, options):
            path = temporary / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.content)
            part_of = str(Path(file.path).parent) if "/" in file.path else "."
            rows[part_of] = rows.get(part_of, 0) + file.rows
        if not any(rows.values()):
            raise InputError(
                f"dataset {opened.dataset.ref}: has nothing that format {name} can hold; convert "
                "rollouts that have rewards"
            )
        about = _readme(name, form, opened.dataset.ref, rows)
        (temporary / "README.md").write_text(about, encoding="utf-8")

    try:
        write_folder(folder, write)
    except InputError:
        shutil.rmtree(temporary_folder(folder), ignore_errors=True)
        raise
    return rows


def _readme(name: str, form: Format, ref: str, rows: dict[str, int]) -> str:
    lines = [f"# {ref} for {name}", "", form.summary, "", f"Read with {form.version}.", ""]
    lines += ["| files | rows |", "|---|---|"]
    lines += [f"| {folder} | {count} |" for folder, count in sorted(rows.items())]
    return "\n".join([*lines, "", f"Kept: {form.keeps}", "", f"Lost: {form.loses}", ""])
