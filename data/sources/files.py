"""Problems from Parquet and JSONL files: a path, a URL that fsspec knows, or a glob of them."""

import hashlib
import posixpath
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

import fsspec
import pyarrow.parquet as pq

from ...schemas.configs import Columns, FilesSource
from ...schemas.contract import parquet_errors
from ...schemas.errors import InputError
from ..json_text import read_json
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
    with parquet_errors(name):
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
    require(names, columns, name)
    with parquet_errors(name):
        for batch in parquet.iter_batches(columns=mapped(columns)):
            batch.validate(full=True)
            rows = batch.to_pylist()
            yield from rows


def _lines(file: Any, name: str) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(TextIOWrapper(file, encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; give a Parquet or JSONL file") from None


def _jsonl_rows(file: Any, name: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    # Line by line, since Arrow's JSON reader wants one type per column: answers are often a
    # number in one line and text in the next.
    for row, line in _lines(file, name):
        if not line.strip():
            continue
        try:
            foreign = read_json(line)
        except ValueError as error:
            raise InputError(f"{name}, row {row}: is not JSON ({error}); mend the line") from None
        if not isinstance(foreign, dict):
            raise InputError(f"{name}, row {row}: is no JSON object; write one object per line")
        require(foreign, columns, f"{name}, row {row}")
        yield row, foreign
