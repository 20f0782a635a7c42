"""Problems tables on the hub as `trace-opd push` sent them: every row as it was, under its own id.

Source `hub` calls; a table with other columns is a foreign one, and read by a column map.
"""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from ...schemas.contract import validate
from ...schemas.tables import PROBLEMS


def is_pushed(columns: Collection[str]) -> bool:
    """Whether a table with these columns is our own."""
    names = set(columns)
    known = {field.name for field in PROBLEMS.schema}
    return names <= known and known - set(PROBLEMS.optional) <= names


def pushed_rows(table: pa.Table, where: str) -> Iterator[dict[str, Any]]:
    """The rows, without their ids, which stage problems makes again from the content.

    Raises:
        InputError: a row that violates the contract of table problems.
    """
    checked = validate(table, PROBLEMS, where).drop_columns(["problem_id"])
    for first, batch in _numbered(checked):
        for row, held in enumerate(batch.to_pylist(), first):
            yield held | {"row": row}


def _numbered(table: pa.Table) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for batch in table.to_batches():
        yield first, batch
        first += len(batch)
