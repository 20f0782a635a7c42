"""Files of a table written by hand, or sent by `trace-opd push`, as Arrow.

written_tables.py reads them here before it checks their rows.
"""

import json
import posixpath
from typing import Any

import pyarrow as pa

from ..schemas.contract import TableContract
from ..schemas.errors import InputError
from .compressed import bare_name
from .input_files import find_files, opened
from .parquet_reader import read_table
from .row_files import JSON_SUFFIXES, BadRow, file_rows

_FILES = "a Parquet, JSONL or JSON file, or several Parquet files of one table"


def read_written(path: str, contract: TableContract) -> tuple[pa.Table, str]:
    """The table of a file, or of the Parquet files that a glob matches, and its name for errors.

    Raises:
        InputError: names the file, the row (from 0) and the column at fault.
    """
    fs, (found, *others) = find_files(path, _FILES)
    if others:
        return _joined(fs, [found, *others], path), posixpath.basename(path)
    where = posixpath.basename(found)
    with opened(fs, found) as file:
        if found.endswith(".parquet"):
            return read_table(file, where), where
        if posixpath.splitext(bare_name(found))[1].lower() not in JSON_SUFFIXES:
            raise InputError(f"{where}: is not {_FILES}; its columns of lists need one")
        rows = []
        for _, row in file_rows(file, where):
            if isinstance(row, BadRow):
                raise row
            rows.append(row)
        return _from_rows(rows, contract, where), where


def _joined(fs: Any, paths: list[str], pattern: str) -> pa.Table:
    """The Parquet files of one table, as `trace-opd push` sends its parts, in the names' order."""
    tables = []
    for path in paths:
        if not path.endswith(".parquet"):
            raise InputError(f"{pattern}: matches several files; give one, or Parquet files alone")
        with opened(fs, path) as file:
            tables.append(read_table(file, posixpath.basename(path)))
        if not tables[-1].schema.equals(tables[0].schema):
            raise InputError(
                f"{pattern}: {posixpath.basename(path)} has other columns than "
                f"{posixpath.basename(paths[0])}; give files of one table"
            )
    return pa.concat_tables(tables)


def _from_rows(rows: list[dict[str, Any]], contract: TableContract, where: str) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        known = name in contract.schema.names
        kind = contract.schema.field(name).type if known else None
        try:
            columns.append(pa.array([row.get(name) for row in rows], kind))
        except (pa.ArrowException, TypeError, OverflowError, ValueError):
            row = next(i for i, row in enumerate(rows) if not _fits(row.get(name), kind))
            value = json.dumps(rows[row][name], ensure_ascii=False)
            raise InputError(
                f"{where}, row {row}: {name} is {value:.80}, table {contract.name} needs {kind}"
            ) from None
    return pa.table(dict(zip(names, columns, strict=True)))


def _fits(value: Any, kind: pa.DataType | None) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, OverflowError, ValueError):
        return False
    return True
