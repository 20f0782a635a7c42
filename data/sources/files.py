"""Problems from Parquet and JSONL files: a path, a URL that fsspec knows, or a glob of them."""

import hashlib
import json
import posixpath
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ...schemas.configs import Columns, FilesSource
from ...schemas.errors import InputError
from .columns import mapped, problem_row, require


def rows(source: FilesSource, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of all files in the order of their names; `seed` changes nothing.

    Raises:
        InputError: names the file, the row (from 0) and the column at fault.
    """
    fs, files = _files(source)
    count = 0
    for name, path in files.items():
        with fs.open(path, "rb") as file:
            for row, foreign in _foreign_rows(file, name, source.columns):
                yield problem_row(foreign, source.columns, source.answer_kind, name, row)
                count += 1
    if not count:
        raise InputError(f"{source.path}: holds no rows; give a file with at least one problem")


def identity(source: FilesSource) -> dict[str, Any]:
    """Names and content hashes of the files in place of their path."""
    fs, files = _files(source)
    hashes = []
    for name, path in files.items():
        with fs.open(path, "rb") as file:
            hashes.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    semantic = source.semantic()
    del semantic["path"]
    return semantic | {"files": hashes}


def _files(source: FilesSource) -> tuple[Any, dict[str, str]]:
    """The file system, and paths by name: the path below the files' common folder, so that no id holds a machine's."""
    fs, pattern = fsspec.url_to_fs(source.path)
    paths = sorted(str(path) for path in fs.glob(pattern))
    if not paths:
        raise InputError(f"{source.path}: no such file; give a Parquet or JSONL file or a glob")
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return fs, {posixpath.relpath(path, folder or "."): path for path in paths}


def _foreign_rows(file: Any, name: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    match posixpath.splitext(name)[1]:
        case ".parquet":
            return enumerate(_parquet_rows(file, name, columns))
        case ".jsonl":
            return _jsonl_rows(file, name, columns)
        case suffix:
            raise InputError(
                f"{name}: ends in {suffix or 'nothing'!r}; give a .parquet or .jsonl file"
            )


def _parquet_rows(file: Any, name: str, columns: Columns) -> Iterator[dict[str, Any]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{name}: is not Parquet ({error})") from None
    require(parquet.schema_arrow.names, columns, name)
    for batch in parquet.iter_batches(columns=mapped(columns)):
        yield from batch.to_pylist()


def _jsonl_rows(file: Any, name: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    # Line by line, since Arrow's JSON reader wants one type per column: answers are often a
    # number in one line and text in the next.
    for row, line in enumerate(TextIOWrapper(file, encoding="utf-8")):
        if not line.strip():
            continue
        try:
            foreign = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}, row {row}: is not JSON ({error}); mend the line") from None
        if not isinstance(foreign, dict):
            raise InputError(f"{name}, row {row}: is no JSON object; write one object per line")
        require(foreign, columns, f"{name}, row {row}")
        yield row, foreign
