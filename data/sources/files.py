"""Problems from Parquet and JSONL files: a path, a URL that fsspec knows, or a glob of them.

The source of kind `files`, called through `sources.rows` by stage problems.
"""

import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...schemas.configs import Columns, FilesSource
from ...schemas.contract import parquet_errors
from ...schemas.errors import InputError
from ..input_files import digest, find_files, json_objects, opened, text_lines
from ..parquet_reader import read_batches
from .columns import mapped, problem_row, require

_LARGE_BATCH_BYTES = 64 << 20


def rows(source: FilesSource, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of all files, sorted by name; `seed` has no effect.

    Raises:
        InputError: names the file, the row (from 0) and the column at fault.
    """
    fs, files = _files(source)
    count = 0
    for name, path in files.items():
        with opened(fs, path) as file:
            for row, foreign in _foreign_rows(file, name, source.columns):
                yield problem_row(foreign, source.columns, source.answer_kind, name, row)
                count += 1
    if not count:
        raise InputError(f"{source.path}: holds no rows; give a file with at least one problem")


def identity(source: FilesSource) -> dict[str, Any]:
    """The source's config with names and content hashes of the files in place of their path."""
    fs, files = _files(source)
    hashes = [[name, digest(fs, path)] for name, path in files.items()]
    semantic = source.semantic()
    del semantic["path"]
    return semantic | {"files": hashes}


def _files(source: FilesSource) -> tuple[Any, dict[str, str]]:
    """The file system, and paths by name. Names are relative to the files' common folder, so no id
    depends on a machine's folders."""
    fs, paths = find_files(source.path, "a Parquet or JSONL file, or a glob of them")
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
        schema = parquet.schema_arrow
    require(schema.names, columns, name)
    for field in schema:
        if field.name in mapped(columns) and pa.types.is_nested(field.type):
            raise InputError(
                f"{name}: column {field.name!r} holds {field.type!s:.80}; give text or a number"
            )
    for batch in read_batches(file, name, mapped(columns)):
        # Row by row if cells are large, since their text is held twice.
        step = 1 if batch.nbytes > _LARGE_BATCH_BYTES else batch.num_rows
        for first in range(0, batch.num_rows, step):
            yield from batch.slice(first, step).to_pylist()


def _jsonl_rows(file: Any, name: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    # Arrow's JSON reader needs one type per column, but answers are often a number in one line and
    # text in the next.
    for row, foreign in json_objects(text_lines(file, name), name):
        require(foreign, columns, f"{name}, row {row}")
        yield row, foreign
