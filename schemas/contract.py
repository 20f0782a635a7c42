"""Table contracts and `validate`, which checks a table against one.

The store validates every table that it reads or writes. Every field has a `description` in its
metadata, every schema its table's name and version. Errors name the column and the row at fault.
"""

import dataclasses
import errno
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .errors import InputError

NAME_KEY = b"trace_opd.table"
VERSION_KEY = b"trace_opd.version"

_NO_CAST = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)


@dataclasses.dataclass(frozen=True)
class TableContract:
    """A table's name, version, Arrow schema and row id, and its rules beyond types.

    labels: string columns with values of an enumeration, or of several; codes: the same for lists
    of integers; nested_labels: for strings in lists of structs, by (column, field); same_length:
    columns of lists of equal length; ranges: (least, most) of finite numbers, or of lists of them;
    filled: lists that are never empty; optional: columns that a table may lack; faults: (column,
    what is wrong, function that returns a mask of wrong rows).
    """

    name: str
    version: int
    schema: pa.Schema
    row_id: str
    labels: dict[str, Iterable[StrEnum]] = dataclasses.field(default_factory=dict)
    codes: dict[str, type[IntEnum]] = dataclasses.field(default_factory=dict)
    nested_labels: dict[tuple[str, str], type[StrEnum]] = dataclasses.field(default_factory=dict)
    same_length: tuple[tuple[str, ...], ...] = ()
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    filled: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    faults: tuple[tuple[str, str, Callable[[pa.Table], Any]], ...] = ()

    def empty(self) -> pa.Table:
        return self.table([])

    def table(self, rows: Iterable[dict]) -> pa.Table:
        """Build a table of this contract from dictionaries, one per row.

        It has the optional columns that a row names.
        """
        rows = list(rows)
        return pa.Table.from_pylist(rows, schema=self.schema_of(set().union(*rows)))

    def schema_of(self, names: Container[str]) -> pa.Schema:
        """The schema with only those optional columns that are among the names."""
        kept = [f for f in self.schema if f.name not in self.optional or f.name in names]
        return pa.schema(kept).with_metadata(self.schema.metadata or {})


def described(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    """A field with its description in its metadata."""
    return pa.field(name, kind, nullable, metadata={"description": description})


def list_of(kind: pa.DataType) -> pa.ListType:
    """Lists whose entries are never null, so Parquet stores no definition level for them."""
    return pa.list_(pa.field("element", kind, nullable=False))


def description(field: pa.Field) -> str:
    """The description in a field's metadata."""
    return (field.metadata or {}).get(b"description", b"").decode()


def make_contract(
    name: str, version: int, fields: list[pa.Field], row_id: str, **checks: Any
) -> TableContract:
    """A contract whose schema's metadata has its name and version; checks: see `TableContract`."""
    metadata: dict[bytes | str, bytes | str] = {
        NAME_KEY: name.encode(),
        VERSION_KEY: str(version).encode(),
    }
    return TableContract(name, version, pa.schema(fields, metadata=metadata), row_id, **checks)


def validate(table: pa.Table, contract: TableContract, where: str = "table") -> pa.Table:
    """Check a table against its contract; return it cast to the contract's schema.

    Raises:
        InputError: names `where`, the column and the first row at fault.
    """
    schema = contract.schema_of(table.column_names)
    check_columns(table, contract, schema.names, where)
    if extra := sorted(set(table.column_names) - set(contract.schema.names)):
        raise InputError(
            f"{where}: column {extra[0]} is not in table {contract.name}; drop or rename it"
        )
    if table.num_columns > len(schema):
        twice = max(table.column_names, key=table.column_names.count)
        raise InputError(f"{where}: column {twice} appears twice; drop one of them")
    columns = []
    for field in schema:
        column = table.column(field.name)
        try:
            column = column.cast(field.type)
        except _NO_CAST as error:
            row = _first_uncast(column, field.type)
            raise InputError(
                f"{where}: column {field.name} is {column.type}, table {contract.name} needs "
                f"{field.type} ({'' if row is None else f'row {row}: '}{error})"
            ) from None
        if not field.nullable and column.null_count:
            raise _fault(where, field.name, pc.is_null(column), "is null; give it a value")
        never_null = pa.types.is_list(field.type) and not field.type.value_field.nullable
        # Arrow's cast accepts null entries.
        if never_null and (row := _first_entry(column, pc.is_null)) is not None:
            raise InputError(
                f"{where}, row {row}: {field.name} has an entry that is null; give it a value"
            )
        columns.append(column)
    checked = pa.Table.from_arrays(columns, schema=schema)
    _check_labels(checked, contract, where)
    _check_lengths(checked, contract, where)
    _check_ranges(checked, contract, where)
    for name, what, faulty in contract.faults:
        bad = faulty(checked)
        if pc.any(bad).as_py():
            raise _fault(where, name, bad, what)
    _check_unique(checked, contract, where)
    return checked


def check_columns(
    table: pa.Table, contract: TableContract, columns: Iterable[str], where: str = "table"
) -> None:
    """Check a table's version and that it has some of its contract's columns.

    Raises:
        InputError: another version, or a missing column.
    """
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version is not None and version != str(contract.version).encode():
        raise InputError(
            f"{where}: is version {version.decode(errors='replace')} of table {contract.name}, "
            "this "
            f"release reads version {contract.version}; make it again with this release"
        )
    for name in columns:
        if name not in table.column_names:
            raise InputError(
                f"{where}: column {name} is missing; table {contract.name} needs it "
                f"({description(contract.schema.field(name))})"
            )


@contextmanager
def parquet_errors(where: str) -> Iterator[None]:
    """Turn Arrow's errors on a file that is damaged or not Parquet into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise  # the disk failed, not the file
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where}: is no complete Parquet file ({reason:.200}); make or copy it again"
        ) from None


def _first_uncast(column: pa.ChunkedArray, kind: pa.DataType) -> int | None:
    """The first row at fault if a column of its type could be cast."""
    try:
        column.slice(0, 0).cast(kind)
    except _NO_CAST:
        return None
    for row in range(len(column)):
        try:
            column.slice(row, 1).combine_chunks().cast(kind)
        except _NO_CAST:
            return row
    return None


def _fault(where: str, column: str, bad: Any, what: str) -> InputError:
    row = pc.index(bad, True).as_py()
    return InputError(f"{where}, row {row}: {column} {what}")


def _check_labels(table: pa.Table, contract: TableContract, where: str) -> None:
    for name, labels in contract.labels.items():
        if name not in table.column_names:  # optional
            continue
        column = table.column(name)
        known = pc.is_in(column, value_set=pa.array([str(label) for label in labels]))
        bad = pc.and_(pc.is_valid(column), pc.invert(known))
        if pc.any(bad).as_py():
            value = column[pc.index(bad, True).as_py()].as_py()
            allowed = ", ".join(labels)
            raise _fault(where, name, bad, f"is {value!r}, not one of {allowed}")
    for name, codes in contract.codes.items():
        if _in_range(table.column(name), codes):
            continue
        known = pa.array([int(code) for code in codes], table.schema.field(name).type.value_type)
        if (row := _first_outside(table.column(name), None, known)) is not None:
            raise InputError(f"{where}, row {row}: {name} is not in 0 … {int(max(codes))}")
    for (name, inner), labels in contract.nested_labels.items():
        if name not in table.column_names:  # optional
            continue
        known = pa.array([str(label) for label in labels])
        if (row := _first_outside(table.column(name), inner, known)) is not None:
            raise InputError(
                f"{where}, row {row}: {name}.{inner} is not one of {', '.join(labels)}"
            )


def _in_range(column: pa.ChunkedArray, codes: type[IntEnum]) -> bool:
    """Whether all entries are within codes without gaps: a fast path for the common case."""
    low, high = int(min(codes)), int(max(codes))
    entries = pc.list_flatten(column)
    extremes = pc.min_max(entries)
    least, most = extremes["min"].as_py(), extremes["max"].as_py()
    gapless = high - low + 1 == len(codes) and entries.null_count == 0
    return gapless and (least is None or low <= least <= most <= high)


def _first_outside(column: pa.ChunkedArray, inner: str | None, known: pa.Array) -> int | None:
    """The first row with a list entry, or a field of one, that is not in `known`."""

    def outside(entries: Any) -> Any:
        values = entries if inner is None else pc.struct_field(entries, inner)
        return pc.invert(pc.is_in(values, value_set=known))

    return _first_entry(column, outside)


def _first_entry(column: pa.ChunkedArray, bad: Callable[[Any], Any]) -> int | None:
    """The first row with a bad list entry; bad: entries -> mask."""
    before = 0
    for chunk in column.chunks:
        mask = bad(pc.list_flatten(chunk))
        if pc.any(mask, min_count=0).as_py():
            at = pc.index(mask, True).as_py()
            return before + pc.list_parent_indices(chunk)[at].as_py()
        before += len(chunk)
    return None


def _check_lengths(table: pa.Table, contract: TableContract, where: str) -> None:
    for first, *others in contract.same_length:
        lengths = pc.list_value_length(table.column(first))
        for other in others:
            if other not in table.column_names:  # optional
                continue
            bad = pc.not_equal(lengths, pc.list_value_length(table.column(other)))
            if pc.any(bad).as_py():
                raise _fault(where, other, bad, f"has another length than {first}")


def _check_ranges(table: pa.Table, contract: TableContract, where: str) -> None:
    for name, (least, most) in contract.ranges.items():
        if name not in table.column_names:
            continue  # optional
        row = outside(table.column(name), least, most)
        if row is not None:
            raise InputError(
                f"{where}, row {row}: {name} has a number that is not finite, or not in "
                f"{least:.6g} … {most:.6g}; make the table again"
            )
    for name in contract.filled:
        bad = pc.equal(pc.list_value_length(table.column(name)), pa.scalar(0))
        if pc.any(bad).as_py():
            raise _fault(where, name, bad, "is empty; drop the row")


def outside(column: pa.ChunkedArray, least: float, most: float) -> int | None:
    """The first row with a number, or list entry, that is NaN or not in least … most; None:
    none.
    """
    before = 0
    nested = pa.types.is_list(column.type)
    for chunk in column.chunks:
        # numpy's extremes propagate NaN, and are ten times as fast as Arrow's of floats.
        numbers = pc.drop_null(pc.list_flatten(chunk) if nested else chunk).to_numpy()
        if len(numbers) and not (numbers.min() >= least and numbers.max() <= most):
            entries = pc.list_flatten(chunk) if nested else chunk
            values = entries.to_numpy(zero_copy_only=False)
            bad = ~((values >= least) & (values <= most)) & entries.is_valid().to_numpy(False)
            at = int(bad.argmax())
            return before + (pc.list_parent_indices(chunk)[at].as_py() if nested else at)
        before += len(chunk)
    return None


def _check_unique(table: pa.Table, contract: TableContract, where: str) -> None:
    ids = table.column(contract.row_id)
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: set[Any] = set()
    for row, value in enumerate(ids.to_pylist()):
        if value in seen:
            raise InputError(
                f"{where}, row {row}: {contract.row_id} {value} appears twice; drop the repeated "
                "row"
            )
        seen.add(value)
