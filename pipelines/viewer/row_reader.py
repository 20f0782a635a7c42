"""Rows of a dataset by number, read row group by row group: never a whole table at once."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.parquet_reader import require_bounded
from ...data.store import Dataset

# Lists of one number per token: as numpy arrays they take a tenth of a Python list's time.
_TOKEN_COLUMNS = ("token_ids", "route", "span_id")


def row_numbers(ids: pa.Array, held: pa.ChunkedArray) -> np.ndarray:
    """Where ids stand in a table's id column: (ids,) int64, −1 for those it does not hold."""
    found = pc.index_in(ids, value_set=held).to_numpy(zero_copy_only=False)  # null becomes NaN
    return np.nan_to_num(found, nan=-1).astype(np.int64)


class RowReader:
    """Some columns of a dataset's rows.

    The row groups read last stay in memory up to `keep_bytes` (the last one always): neighbours in
    a list are neighbours on disk. Any thread may call it.
    """

    def __init__(
        self, dataset: Dataset, columns: Sequence[str], keep_bytes: int = 16 << 20
    ) -> None:
        self._dataset = dataset
        self._columns = list(columns)
        self._keep_bytes = keep_bytes
        self._parts = dataset.manifest["parts"]
        self._starts = np.cumsum([0, *(part["rows"] for part in self._parts)])
        self._group_starts: dict[int, np.ndarray] = {}
        self._kept: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[dict[str, Any] | None]:
        """Rows in the order of their numbers; None for a number below 0.

        Columns of a number per token are numpy arrays.
        """
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        with self._lock:
            for place, number in enumerate(numbers):
                if number >= 0:
                    group, row = self._locate(int(number))
                    wanted.setdefault(group, []).append((place, row))
            out: list[dict[str, Any] | None] = [None] * len(numbers)
            for group, hits in wanted.items():
                taken = self._group(*group).take([row for _, row in hits])
                for (place, _), row in zip(hits, _dictionaries(taken), strict=True):
                    out[place] = row
        return out

    def _locate(self, number: int) -> tuple[tuple[int, int], int]:
        """((part, row group), row in it)."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        if part not in self._group_starts:
            with self._open(part) as file:
                require_bounded(file, f"{self._dataset.ref}/{self._parts[part]['name']}")
                metadata = pq.read_metadata(file)
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            self._group_starts[part] = np.cumsum([0, *sizes])
        row = number - int(self._starts[part])
        starts = self._group_starts[part]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return (part, group), row - int(starts[group])

    def _group(self, part: int, group: int) -> pa.Table:
        table = self._kept.pop((part, group), None)
        if table is None:
            with self._open(part) as file:
                table = pq.ParquetFile(file).read_row_group(group, columns=self._columns)
        self._kept[part, group] = table
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > self._keep_bytes:
            self._kept.popitem(last=False)
        return table

    def _open(self, part: int):
        return self._dataset.files.open(f"{self._dataset.ref}/{self._parts[part]['name']}")


def _dictionaries(table: pa.Table) -> list[dict[str, Any]]:
    per_token = [name for name in table.column_names if name in _TOKEN_COLUMNS]
    rows = table.drop_columns(per_token).to_pylist()
    for name in per_token:
        for row, value in zip(rows, table[name], strict=True):
            row[name] = value.values.to_numpy()
    return rows
