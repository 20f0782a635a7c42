"""Parquet read within memory limits: a small file may claim gigabytes.

Compression, dictionaries and run lengths let a kilobyte stand for gigabytes. So the sizes that a
file states are checked first. Text is read as dictionaries and indices, which takes no more memory
than it takes in the file, and its full size is summed before it becomes text. Parts of a store,
problem files and the viewer's rows are read here.
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

# Limits on the unfolded size, in bytes and times the file's size. Our parts stay below 20 times.
_MOST_BYTES, _MOST_TIMES = 256 << 20, 100
# Distinct rows take more than a byte of the file each.
_MOST_ROWS = 1_000_000
_VALUE_BYTES = 8
_BATCH_ROWS = 1024


def read_table(
    file: Any, where: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """A file's table, or the named columns in their order, with pages checked against their CRC.

    optional: columns that the file may lack.

    Raises:
        InputError: not Parquet, a missing column, or above the limit.
    """
    folded = _open(file, where, columns, pre_buffer=True, page_checksum_verification=True)
    picked = list(columns) if columns is not None else None
    with parquet_errors(where):
        table = folded.parquet.read(columns=picked)
        folded.check(sum(_unfolded_bytes(chunk) for c in table.columns for chunk in c.chunks))
        if picked is not None:
            missing = [name for name in picked if name not in table.column_names]
            if lacking := [name for name in missing if name not in optional]:
                raise ValueError(f"there is no column {lacking[0]}")
            picked = [name for name in picked if name not in missing]
            table = table.select(picked)
        return table.cast(folded.schema_of(table.column_names))


def read_batches(file: Any, where: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a file in batches, each checked to hold valid values.

    Raises:
        InputError: not Parquet, or above the limit.
    """
    folded = _open(file, where, columns)
    with parquet_errors(where):
        for batch in folded.batches(columns):
            batch.validate(full=True)
            yield batch.cast(folded.schema_of(batch.schema.names))


def require_bounded(file: Any, where: str) -> None:
    """Check how much a file unfolds to, without unfolding it.

    Raises:
        InputError: not Parquet, or above the limit.
    """
    folded = _open(file, where)
    with parquet_errors(where):
        for _ in folded.batches(folded.texts):
            pass


@dataclass(frozen=True)
class _Folded:
    """A file whose text columns are read as dictionaries and indices.

    schema: as the file is read otherwise; texts: paths of the text leaves; size: of the file in
    bytes; most: the limit in bytes.
    """

    parquet: pq.ParquetFile
    schema: pa.Schema
    texts: list[str]
    where: str
    size: int
    most: int

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Folded batches, while their unfolded size is within the limit."""
        total = 0
        for batch in self.parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            total += sum(_unfolded_bytes(column) for column in batch.columns)
            self.check(total)
            yield batch

    def check(self, unfolded: int) -> None:
        if unfolded > self.most:
            raise InputError(
                f"{self.where}: unfolds from {self.size:,} to more than {self.most:,} bytes; "
                "write it anew without what repeats, or split it"
            )

    def schema_of(self, names: Sequence[str]) -> pa.Schema:
        """The unfolded fields of some names; a duplicate name takes its fields in order."""
        held = {name: iter(self.schema.get_all_field_indices(name)) for name in names}
        fields = [self.schema.field(next(held[name])) for name in names]
        return pa.schema(fields).with_metadata(self.schema.metadata)


def _open(file: Any, where: str, columns: Sequence[str] | None = None, **options: Any) -> _Folded:
    """Open a file and check the sizes that it states. A file with false page sizes costs at most 2
    GiB for each column, the format's limit for a page."""
    with parquet_errors(where):
        size = file.seek(0, 2)
        plain = pq.ParquetFile(file)
        metadata = plain.metadata
        if metadata.num_rows > max(_MOST_ROWS, size):
            raise InputError(
                f"{where}: claims {metadata.num_rows:,} rows in {size:,} bytes; it is damaged, or "
                "made to fill the memory"
            )
        leaves = _leaves(metadata, columns)
        texts = [path for path, kind in leaves.values() if kind == "BYTE_ARRAY"]
        parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=texts, **options)
        most = max(_MOST_BYTES, _MOST_TIMES * size)
        folded = _Folded(parquet, plain.schema_arrow, texts, where, size, most)
        folded.check(_stated_bytes(file, metadata, list(leaves)))
        return folded


def _leaves(metadata: Any, columns: Sequence[str] | None) -> dict[int, tuple[str, str]]:
    """Path and physical type, by number, of the leaf columns under the named ones."""
    leaves = {}
    for number in range(metadata.num_columns):
        leaf = metadata.schema.column(number)
        if columns is None or any(f"{leaf.path}.".startswith(f"{name}.") for name in columns):
            leaves[number] = leaf.path, leaf.physical_type
    return leaves


def _stated_bytes(file: Any, metadata: Any, leaves: Sequence[int]) -> int:
    """The size that the columns unfold to according to the footer, with dictionaries folded."""
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
    return 0  # numbers: `_stated_bytes` counts them
