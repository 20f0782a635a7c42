"""The parts of a dataset: Parquet files, written reproducibly and checked when they are read.

`Dataset` and `Draft` read and write their tables here.
"""

import errno
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.contract import TableContract, check_columns, validate
from ..schemas.errors import InputError
from .parquet_reader import read_table
from .store_files import StoreFiles


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def read_part(
    files: StoreFiles,
    ref: str,
    index: int,
    contract: TableContract | None,
    columns: Sequence[str] | None,
) -> pa.Table:
    """One part of a dataset `ref`, or some columns of it, checked against the contract.

    columns: optional ones are left out where the part lacks them.

    Raises:
        InputError: it is gone; DamagedFile: its content is damaged.
    """
    name = part_name(index)
    picked = list(columns) if columns else None
    with files.open(f"{ref}/{name}") as file:
        try:
            table = read_table(file, name, picked, () if contract is None else contract.optional)
            table.validate(full=True)  # a damaged or forged file may hold wrong offsets
        except (InputError, pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise  # the disk failed; the file may be intact
            mend = (
                f"`trace-opd verify-store {ref}` says how to make a finished dataset again, and "
                "the command that makes an unfinished one makes the part again"
            )
            raise files.damaged(f"{ref}/{name}", error, mend) from error
    if contract is None:
        return table
    if picked is not None:
        check_columns(table, contract, table.column_names, f"{ref}/{name}")
        return table
    return validate(table, contract, f"{ref}/{name}")


def count_rows(files: StoreFiles, path: str) -> int:
    """Raises DamagedFile if the file is not Parquet."""
    with files.open(path) as file:
        try:
            return pq.read_metadata(file).num_rows
        except (pa.ArrowException, ValueError) as error:
            raise files.damaged(path, error, "remove it and run the same command again") from error


def encoded(table: pa.Table) -> bytes:
    """A table as a Parquet file; equal tables give equal bytes.

    Dictionaries and statistics are limited to flat columns: for lists of tokens and
    log-probabilities they are slow and save nothing. Lists of 4-byte numbers are split into byte
    streams, because the upper bytes of token ids are mostly alike.
    """
    flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    split = {
        f"{field.name}.list.element": "BYTE_STREAM_SPLIT"
        for field in table.schema
        if pa.types.is_list(field.type) and field.type.value_type in (pa.int32(), pa.float32())
    }
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {
        "use_dictionary": flat, "write_statistics": flat, "column_encoding": split,
    }  # fmt: skip
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    return sink.getvalue().to_pybytes()
