"""What is wrong with rows of training tables beyond types: masks for their contracts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .labels import ErrorType, Route, SpanKind


def untaught(table: pa.Table) -> Any:
    """Rows with a routed token but no context for their teacher."""
    bare = pc.and_(pc.is_null(table["diagnostic_type"]), pc.is_null(table["teacher_context"]))
    rows = np.flatnonzero(bare.to_numpy())
    routes = table["route"].combine_chunks().take(pa.array(rows, pa.int64()))
    mask = np.zeros(len(table), dtype=bool)
    routed = np.flatnonzero(pc.list_flatten(routes).to_numpy())
    mask[rows[pc.list_parent_indices(routes).to_numpy()[routed]]] = True
    return pa.array(mask)


UNWRITTEN = (
    "policy_mask",
    "has no true entry; drop the row, nothing of it is the policy's",
)
FOREIGN_ROUTE = (
    "route",
    "is not 0 at a token that the policy did not write (policy_mask false); set it to 0",
)


def unwritten(table: pa.Table) -> Any:
    """Rows with tokens of which the policy wrote none."""
    mask = np.zeros(len(table), dtype=bool)
    if "policy_mask" in table.column_names:
        lists = table["policy_mask"].combine_chunks()
        written = pc.list_parent_indices(lists).filter(pc.list_flatten(lists)).to_numpy()
        mask = pc.list_value_length(lists).to_numpy() > 0
        mask[written] = False
    return pa.array(mask)


def routed_foreign(table: pa.Table) -> Any:
    """Rows with a routed token that the policy did not write."""
    mask = np.zeros(len(table), dtype=bool)
    if "policy_mask" in table.column_names:
        lists = table["route"].combine_chunks()
        routes = pc.list_flatten(lists).to_numpy()
        written = pc.list_flatten(table["policy_mask"].combine_chunks())
        written = written.to_numpy(zero_copy_only=False)
        mask[pc.list_parent_indices(lists).to_numpy()[(routes != 0) & ~written]] = True
    return pa.array(mask)


def uneven_scores(table: pa.Table) -> Any:
    """Rows whose likeliest tokens are not equally many at each position."""
    places, top = (
        pc.list_value_length(table[name]).to_numpy() for name in ("positions", "top_token_ids")
    )
    share = top // np.maximum(places, 1)
    return pa.array((share * places != top) | ((places > 0) & (top == 0)))


def unordered_positions(table: pa.Table) -> Any:
    """Rows whose positions do not ascend."""
    lists = table["positions"].combine_chunks()
    values, rows = pc.list_flatten(lists).to_numpy(), pc.list_parent_indices(lists).to_numpy()
    mask = np.zeros(len(table), dtype=bool)
    mask[rows[1:][(np.diff(values) <= 0) & (np.diff(rows) == 0)]] = True
    return pa.array(mask)


def misfit(name: str) -> Callable[[pa.Table], Any]:
    """Rows in which an optional list has another length than the positions."""

    def rows(table: pa.Table) -> Any:
        if name not in table.column_names:
            return pa.array(np.zeros(len(table), dtype=bool))
        lengths = (pc.list_value_length(table[column]) for column in ("positions", name))
        return pc.fill_null(pc.not_equal(*lengths), pa.scalar(False))

    return rows


def uncompared(table: pa.Table) -> Any:
    """Rows with a reweighted token but no contrast, in a table that has contrasts."""
    mask = np.zeros(len(table), dtype=bool)
    if "contrast_contexts" in table.column_names:
        counts = pc.list_value_length(table["contrast_contexts"]).to_numpy()
        rows = np.flatnonzero(~(counts > 0))  # null is NaN
        routes = table["route"].combine_chunks().take(pa.array(rows, pa.int64()))
        compared = pc.list_flatten(routes).to_numpy() == int(Route.REWEIGHT)
        mask[rows[pc.list_parent_indices(routes).to_numpy()[compared]]] = True
    return pa.array(mask)


NO_MISTAKE = (
    "diagnostic_type",
    "names a mistake, and the response is right or has key spans; give it a label of "
    "DiagnosticType",
)


def _mistakes(table: pa.Table) -> Any:
    """Rows whose label names a mistake."""
    return pc.is_in(table["diagnostic_type"], value_set=pa.array([str(x) for x in ErrorType]))


def mistake_in_right(table: pa.Table) -> Any:
    """Rows of right responses whose label names a mistake."""
    return pc.and_(_mistakes(table), pc.is_in(table["correct"], value_set=pa.array([True])))


def mistake_in_key(table: pa.Table) -> Any:
    """Rows with a key span whose label names a mistake."""
    spans: Any = table["spans"].combine_chunks()
    kinds: Any = pc.struct_field(pc.list_flatten(spans), "kind")
    keys = pc.is_in(kinds, value_set=pa.array([str(SpanKind.KEY)]))
    mask = np.zeros(len(table), dtype=bool)
    mask[pc.list_parent_indices(spans).filter(keys).to_numpy()] = True
    return pc.and_(_mistakes(table), pa.array(mask))
