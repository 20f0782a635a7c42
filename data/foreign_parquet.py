"""Parquet of others: what it unfolds to is known before it is unfolded.

Compression, dictionaries and run lengths let a kilobyte stand for gigabytes. Sizes that a file states
are checked first. Text is read as dictionaries and indices, which takes the memory that it takes in the
file, and its size is summed before it is made into text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..schemas.contract import parquet_errors
from ..schemas.errors import InputError
from .parquet_footer import column_chunks

# A file may unfold to so many bytes, or to so many times its own size. Our own parts stay below 20 times.
_MOST_BYTES, _MOST_TIMES = 256 << 20, 100
# A row that differs from others takes more than a byte of the file.
_MOST_ROWS = 1_000_000
_VALUE_BYTES = 8
_BATCH_ROWS = 1024


def read_table(file: Any, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A file's table, or the named columns in their order, with pages checked against their CRC.

    Raises:
        InputError: no Parquet, a column that is not there, or more than is allowed.
    """
    folded = _open(file, where, columns, pre_buffer=True, page_checksum_verification=True)
    picked = list(columns) if columns is not None else None
    with parquet_errors(where):
        table = folded.parquet.read(columns=picked)
        if sum(_unfolded_bytes(chunk) for c in table.columns for chunk in c.chunks) > folded.most:
            raise _too_large(where, folded)
        if picked is not None:
            if missing := [name for name in picked if name not in table.column_names]:
                raise ValueError(f"there is no column {missing[0]}")
            table = table.select(picked)
        return table.cast(_schema_of(table.column_names, folded.schema))


def read_batches(file: Any, where: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a file in batches, each checked to hold valid values.

    Raises:
        InputError: no Parquet, or more than is allowed.
    """
    folded = _open(file, where, columns)
    total = 0
    with parquet_errors(where):
        for batch in folded.parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            total += sum(_unfolded_bytes(column) for column in batch.columns)
            if total > folded.most:
                raise _too_large(where, folded)
            batch.validate(full=True)
            yield batch.cast(_schema_of(batch.schema.names, folded.schema))


def require_bounded(file: Any, where: str) -> None:
    """Check how much a file unfolds to, without unfolding it.

    Raises:
        InputError: no Parquet, or more than is allowed.
    """
    folded = _open(file, where)
    total = 0
    with parquet_errors(where):
        for batch in folded.parquet.iter_batches(batch_size=_BATCH_ROWS, columns=folded.texts):
            total += sum(_unfolded_bytes(column) for column in batch.columns)
            if total > folded.most:
                raise _too_large(where, folded)


@dataclass(frozen=True)
class _Folded:
    """A file whose text columns are read as dictionaries and indices.

    schema: as the file is read otherwise; texts: paths of the text leaves; size, most: bytes of the file,
    and to how many it may unfold.
    """

    parquet: pq.ParquetFile
    schema: pa.Schema
    texts: list[str]
    size: int
    most: int


def _open(file: Any, where: str, columns: Sequence[str] | None = None, **options: Any) -> _Folded:
    """Open a file and check the sizes that it states. A file that lies about its pages costs at most
    2 GiB for each column, the format's limit for a page."""
    with parquet_errors(where):
        size = file.seek(0, 2)
        most = max(_MOST_BYTES, _MOST_TIMES * size)
        plain = pq.ParquetFile(file)
        metadata = plain.metadata
        if metadata.num_rows > max(_MOST_ROWS, size):
            raise InputError(
                f"{where}: claims {metadata.num_rows:,} rows in {size:,} bytes; it is damaged, or made "
                "to fill the memory"
            )
        leaves = _leaves(metadata, columns)
        texts = [path for path, kind in leaves.values() if kind == "BYTE_ARRAY"]
        parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=texts, **options)
        folded = _Folded(parquet, plain.schema_arrow, texts, size, most)
        if _stated_bytes(file, metadata, list(leaves)) > most:
            raise _too_large(where, folded)
        return folded


def _schema_of(names: Sequence[str], schema: pa.Schema) -> pa.Schema:
    """The fields of those names in their order; a name that stands twice has its fields in order."""
    held = {name: iter(schema.get_all_field_indices(name)) for name in names}
    fields = [schema.field(next(held[name])) for name in names]
    return pa.schema(fields).with_metadata(schema.metadata)


def _too_large(where: str, folded: _Folded) -> InputError:
    return InputError(
        f"{where}: unfolds from {folded.size:,} to more than {folded.most:,} bytes; write it anew "
        "without what repeats, or split it"
    )


def _leaves(metadata: Any, columns: Sequence[str] | None) -> dict[int, tuple[str, str]]:
    """Path and physical type of the leaf columns under the named ones, by number."""
    leaves = {}
    for number in range(metadata.num_columns):
        leaf = metadata.schema.column(number)
        if columns is None or any(f"{leaf.path}.".startswith(f"{name}.") for name in columns):
            leaves[number] = leaf.path, leaf.physical_type
    return leaves


def _stated_bytes(file: Any, metadata: Any, leaves: Sequence[int]) -> int:
    """What the file's own metadata say that the columns unfold to, dictionaries left folded."""
    total = 0
    widths = [max(_VALUE_BYTES, metadata.schema.column(number).length or 0) for number in leaves]
    for chunks in column_chunks(file, metadata.num_columns):
        for number, width in zip(leaves, widths, strict=True):
            chunk = chunks[number]
            total += max(chunk.uncompressed_bytes, 0) + width * max(chunk.values, chunk.rows, 0)
    return total


def _unfolded_bytes(array: Any) -> int:
    """Bytes of the text that an array of dictionaries stands for."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return pc.sum(lengths).as_py() or 0
    if pa.types.is_map(kind):
        return _unfolded_bytes(array.keys) + _unfolded_bytes(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _unfolded_bytes(array.flatten())
    if pa.types.is_struct(kind):
        return sum(_unfolded_bytes(child) for child in array.flatten())
    return 0  # numbers: counted by the sizes that the file states
