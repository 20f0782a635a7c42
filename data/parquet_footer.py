"""The sizes that a Parquet file's footer states, parsed from its bytes for `parquet_reader`.

pyarrow's `RowGroupMetaData.column` aborts the process on a damaged footer, because it lets a C++
exception escape. The footer is a Thrift struct in the compact protocol (github.com/apache/thrift,
doc/specs/thrift-compact-protocol.md) with the fields of parquet.thrift
(github.com/apache/parquet-format).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"PAR1"
_DEEPEST = 16  # levels of structs and lists; the format needs 7
# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 6, 7, 8, 9, 10, 12


@dataclass(frozen=True)
class ColumnChunk:
    """What the footer states about one column in one row group."""

    rows: int
    values: int
    uncompressed_bytes: int


def column_chunks(file: Any, columns: int) -> Iterator[list[ColumnChunk]]:
    """Each row group's column chunks, in the schema's order. columns: their number in the schema.

    Raises:
        ValueError: the footer is missing or damaged.
    """
    try:
        groups = _Reader(_footer(file)).struct(0)[4]
        for group in groups:
            chunks = [chunk[3] for chunk in group[1]]
            if len(chunks) != columns:
                raise ValueError(f"a row group has {len(chunks)} columns, the schema {columns}")
            yield [ColumnChunk(int(group[3]), int(c[5]), int(c[6])) for c in chunks]
    except (KeyError, IndexError, TypeError, struct.error):
        raise ValueError("its footer is damaged") from None


def _footer(file: Any) -> bytes:
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    end = file.read(8)
    (length,) = struct.unpack("<I", end[:4])
    if end[4:] != _MAGIC or length + 8 > size:
        raise ValueError("it has no Parquet footer")
    file.seek(size - 8 - length)
    return file.read(length)


class _Reader:
    """Parses values of the compact protocol; a struct becomes a dict by field id."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deep")
        fields: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            fields[field] = self._value(head & 15, depth, boolean=(head & 15) == _TRUE)
        return fields

    def _value(self, kind: int, depth: int, boolean: bool | None = None) -> Any:
        """boolean: the value of a struct's boolean field, which its type encodes."""
        if kind in (_TRUE, _FALSE):
            return self._byte() == _TRUE if boolean is None else boolean
        if kind == _BYTE:
            return self._byte()
        if _BYTE < kind <= _I64:
            return self._zigzag()
        if kind == _DOUBLE:
            return struct.unpack("<d", self._bytes(8))[0]
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"its footer holds a value of the type {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        if count > len(self._content) - self._at:  # an element takes at least a byte
            raise ValueError("its footer states a list longer than itself")
        return [self._value(head & 15, depth) for _ in range(count)]

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        found = self._content[self._at : self._at + count]
        if len(found) < count:
            raise ValueError("its footer is cut")
        self._at += count
        return found

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer holds a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
