"""What the columns of a table or file are, before they are mapped to roles (columns.py).

Sources `files` and `hub` call this.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.configs import Columns
from ..row_files import BadRow
from .columns import KNOWN, Found, plain
from .problem_rows import HASHED

_LIKELY = {*KNOWN["answer"], *KNOWN["solution"]}


def found_in_rows(rows: Iterable[dict[str, Any] | BadRow]) -> Found | None:
    """None if there is no good row."""
    names: dict[str, None] = {}
    hashed: set[str] = set()
    lists: set[str] = set()
    images: set[str] = set()
    for row in rows:
        if isinstance(row, BadRow):
            continue
        for key, value in row.items():
            names[key] = None
            if isinstance(value, dict):
                names.update(dict.fromkeys(f"{key}.{inner}" for inner in value))
            if isinstance(value, dict | list):
                lists.add(key)
                if _is_file(value):
                    images.add(key)
            elif isinstance(value, str) and HASHED.search(value):
                hashed.add(key)
    found = map(frozenset, (hashed, lists, images))
    return Found(tuple(names), *found) if names else None


def _is_file(value: Any) -> bool:
    """Whether a JSON value is a file as `datasets` exports it, or a list of them."""
    if isinstance(value, list):
        return bool(value) and _is_file(value[0])
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def likely_texts(schema: pa.Schema, columns: Columns) -> list[str]:
    """The text columns that may hold the answer, whose cells `found_in_batches` needs."""
    return [
        field.name
        for field in schema
        if (plain(field.name) in _LIKELY or field.name == columns.answer)
        and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
    ]


def found_in_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Found:
    """schema: of the table; batches: of its likely texts."""
    names = [name for field in schema for name in _names(field.name, field.type)]
    lists = (field.name for field in schema if pa.types.is_nested(field.type))
    images = (field.name for field in schema if _is_file_type(field.type))
    hashed: set[str] = set()
    for batch in batches:
        for name in set(batch.schema.names) - hashed:
            if pc.any(pc.match_substring_regex(batch[name], HASHED.pattern)).as_py():
                hashed.add(name)
    return Found(tuple(names), frozenset(hashed), frozenset(lists), frozenset(images))


def _is_file_type(kind: pa.DataType) -> bool:
    """Whether a column holds files: images and sounds of `datasets` are structs with their
    bytes."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_file_type(kind.value_type)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    held = kind.field("bytes").type
    return pa.types.is_binary(held) or pa.types.is_large_binary(held)


def _names(name: str, kind: pa.DataType) -> Iterator[str]:
    yield name
    if pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            yield f"{name}.{kind.field(index).name}"
