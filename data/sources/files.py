"""Problems from files: paths, URLs that fsspec knows, globs and folders of them.

The source of kind `files`, called through `sources.rows` by stage problems. Each file has its own
column map, found from all its rows, so files of different sets can be read together.
"""

import posixpath
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ...schemas.configs import Columns, FilesSource
from ...schemas.errors import InputError
from ..input_files import digest, find_files, opened
from ..parquet_reader import read_batches
from ..row_files import KINDS, BadRow, bad_row, file_rows, is_known, parquet_schema
from .columns import ColumnMap, resolve, root
from .found import found_in_batches, found_in_rows, likely_texts
from .problem_rows import problem_row


def rows(source: FilesSource, seed: int) -> Iterator[dict[str, Any] | BadRow]:
    """Rows of all files, in the paths' order, sorted by name in each; `seed` has no effect.

    Raises:
        InputError: names the file, the row (from 0) and the column at fault.
    """
    fs, files = _files(source)
    count = 0
    for name, path in files.items():
        columns = _column_map(fs, path, name, digest(fs, path), source.columns.model_dump_json())
        with opened(fs, path) as file:
            for row, foreign in file_rows(file, name, columns and _roots(file, name, columns)):
                count += 1
                if isinstance(foreign, BadRow):
                    yield foreign
                elif columns is None:
                    what = "has no columns"
                    yield bad_row(f"{name}, row {row}", what, "fill it in, or leave the row out")
                else:
                    yield problem_row(foreign, columns, source.answer_kind, name, row)
    if not count:
        shown = source.path if isinstance(source.path, str) else ", ".join(source.path)
        raise InputError(f"{shown}: holds no rows; give a file with at least one problem")


def identity(source: FilesSource) -> dict[str, Any]:
    """The source's config with names and content hashes of the files in place of their path, and
    the columns in use."""
    fs, files = _files(source)
    hashes = [[name, digest(fs, path)] for name, path in files.items()]
    config = source.columns.model_dump_json()
    maps = {
        name: columns.identity()
        for name, sha256 in hashes
        if (columns := _column_map(fs, files[name], name, sha256, config)) is not None
    }
    semantic = source.semantic()
    del semantic["path"]
    distinct = list({str(columns): columns for columns in maps.values()}.values())
    semantic["columns"] = distinct[0] if len(distinct) == 1 else maps
    return semantic | {"files": hashes}


def _files(source: FilesSource) -> tuple[Any, dict[str, str]]:
    """The file system, and paths by name. Names are relative to the files' common folder, so no id
    depends on a machine's folders."""
    patterns = [source.path] if isinstance(source.path, str) else source.path
    if not patterns:
        raise InputError(f"source.path: is an empty list; give {KINDS}")
    found = [find_files(pattern, KINDS, is_known) for pattern in patterns]
    fs = found[0][0]
    if any(other != fs for other, _ in found):
        raise InputError("source.path: names files of several file systems; copy them to one")
    paths = list(dict.fromkeys(path for _, held in found for path in held))
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return fs, {posixpath.relpath(path, folder or "."): path for path in paths}


# One pass over a file's rows; stage problems needs its result for the id, and then for the rows.
@lru_cache(maxsize=1024)
def _column_map(fs: Any, path: str, name: str, sha256: str, config: str) -> ColumnMap | None:
    """A file's columns; None if it has no good row. sha256: the file may change under its path;
    config: of the columns, as JSON."""
    columns = Columns.model_validate_json(config)
    with opened(fs, path) as file:
        if _is_parquet(name):
            schema = parquet_schema(file, name)
            texts = likely_texts(schema, columns)
            found = found_in_batches(schema, read_batches(file, name, texts) if texts else ())
        else:
            found = found_in_rows(row for _, row in file_rows(file, name))
    return None if found is None else resolve(found, columns, name)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _roots(file: Any, name: str, columns: ColumnMap) -> list[str] | None:
    """Top-level columns to read of a Parquet file; None for other files."""
    if not _is_parquet(name):
        return None
    present = parquet_schema(file, name).names
    names = [*columns.names(), *columns.images]
    return list(dict.fromkeys(root(column, present) for column in names))
