"""Reads single rows of a dataset by row number, a part at a time: never the table at once.

rollout_view.RolloutReader keeps one reader per table behind a page.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.store import Dataset
from ...schemas.errors import DamagedFile

# Lists of one number per token: a numpy array takes a tenth of a Python list's time.
_TOKEN_COLUMNS = ("token_ids", "route", "span_id")


class RowReader:
    """Some columns of a dataset's rows; optional ones where its table has them. Thread-safe.

    Neighbours in a list are neighbours on disk, so the parts that were read last stay in memory:
    the last one always, more of them up to `keep_bytes`.
    """

    def __init__(
        self, dataset: Dataset, columns: Sequence[str], keep_bytes: int = 16 << 20
    ) -> None:
        self._dataset = dataset
        self._columns = list(columns)
        self._keep_bytes = keep_bytes
        self._sizes = [part["rows"] for part in dataset.manifest["parts"]]
        self._starts = np.cumsum([0, *self._sizes])
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[dict[str, Any] | None]:
        """Rows in the order of their numbers; None for a negative number.

        Columns of one number per token are numpy arrays.

        Raises:
            InputError: a part is missing; DamagedFile: a part is damaged.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        out: list[dict[str, Any] | None] = [None] * len(numbers)
        with self._lock:
            for part in np.unique(parts[numbers >= 0]).tolist():
                places = np.flatnonzero((parts == part) & (numbers >= 0))
                taken = self._part(part).take(numbers[places] - self._starts[part])
                for place, row in zip(places.tolist(), _dictionaries(taken), strict=True):
                    out[place] = row
        return out

    def _part(self, part: int) -> pa.Table:
        table = self._kept.pop(part, None)
        if table is None:
            table = self._dataset.read_part(part, self._columns)
            if table.num_rows != self._sizes[part]:
                raise DamagedFile(
                    f"{self._dataset.ref}: part {part} holds {table.num_rows:,} rows, its manifest "
                    f"says {self._sizes[part]:,}; run `trace-opd verify-store {self._dataset.ref}`"
                )
        self._kept[part] = table
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > self._keep_bytes:
            self._kept.popitem(last=False)
        return table


def _dictionaries(table: pa.Table) -> list[dict[str, Any]]:
    per_token = [name for name in table.column_names if name in _TOKEN_COLUMNS]
    rows = table.drop_columns(per_token).to_pylist()
    for name in per_token:
        for row, value in zip(rows, table[name], strict=True):
            row[name] = value.values.to_numpy()
    return rows
