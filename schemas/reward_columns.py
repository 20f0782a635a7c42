"""Which rows of a table have metadata or parts of a reward that cannot be right.

tables.py makes them faults of the contracts of problems and verdicts.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .labels import VerdictStatus


def no_json_objects(table: pa.Table) -> pa.Array:
    """Rows whose metadata is text and no JSON object."""
    if "metadata" not in table.column_names:
        return pa.array(np.zeros(len(table), dtype=bool))
    texts = table["metadata"].to_pylist()
    return pa.array([text is not None and not _is_object(text) for text in texts], pa.bool_())


def odd_parts(table: pa.Table) -> pa.Array:
    """Rows with a part whose value is not in 0 … 1, or whose status is none of VerdictStatus."""
    mask = np.zeros(len(table), dtype=bool)
    if "parts" in table.column_names:
        parts: Any = table["parts"].combine_chunks()
        entries = pc.list_flatten(parts)
        status: Any = pc.struct_field(entries, "status")
        value: Any = pc.struct_field(entries, "value")
        known = pc.is_in(status, value_set=pa.array([str(one) for one in VerdictStatus]))
        numbers = value.to_numpy(zero_copy_only=False)  # NaN where null
        within = (numbers >= 0) & (numbers <= 1)
        valid = value.is_valid().to_numpy(zero_copy_only=False)
        bad = ~known.to_numpy(zero_copy_only=False) | (valid & ~within)
        mask[pc.list_parent_indices(parts).to_numpy(zero_copy_only=False)[bad]] = True
    return pa.array(mask)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
