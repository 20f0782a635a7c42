"""Which rollouts a list shows, and in what order: filters, text search, sorting.

view.py calls it for every request that names a list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.conversation import COLUMN, wording
from .rollout_index import RolloutIndex
from .rollout_tables import Tables

SORT_DISAGREEMENT = "disagreement"


@dataclass(frozen=True)
class Query:
    """filters: (facet, value); text: found in problem, response or id, ignoring case; sort: empty
    for the index's own order, or `disagreement`, the largest first."""

    filters: tuple[tuple[str, str], ...] = ()
    text: str = ""
    sort: str = ""


def read_query(parameters: Mapping[str, str], index: RolloutIndex) -> Query:
    """The query in a request's parameters; ignores parameters that are not part of a query."""
    facets = [facet.name for facet in index.facets]
    return Query(
        filters=tuple((name, parameters[name]) for name in facets if parameters.get(name)),
        text=parameters.get("q", ""),
        sort=parameters.get("sort", ""),
    )


def select(index: RolloutIndex, tables: Tables, query: Query) -> np.ndarray:
    """Positions in the index of the rollouts that match a query, in the query's order."""
    matches = np.ones(len(index), dtype=bool)
    facets = {facet.name: facet for facet in index.facets}
    for name, value in query.filters:
        values = facets[name].values
        matches &= facets[name].codes == (values.index(value) if value in values else -1)
    if query.text:
        matches &= _contains(index, tables, query.text)
    positions = np.flatnonzero(matches)
    if query.sort == SORT_DISAGREEMENT and index.disagreement is not None:
        scores = np.nan_to_num(index.disagreement[positions], nan=-1.0)
        positions = positions[np.argsort(-scores, kind="stable")]
    return positions


def next_disagreement(index: RolloutIndex, positions: np.ndarray, after: int) -> int | None:
    """The next place in a selection, after one of its places, where the annotators disagree."""
    if index.disagreement is None:
        return None
    later = np.flatnonzero(index.disagreement[positions[after + 1 :]] > 0)
    return after + 1 + int(later[0]) if len(later) else None


def _contains(index: RolloutIndex, tables: Tables, text: str) -> np.ndarray:
    """(rollouts,) bool: whether problem, response or id contains a text. Reads part by part."""
    problems = _texts_contain(tables.by_role["problems"], ["problem", COLUMN], wording, text)
    responses = _texts_contain(
        tables.by_role["rollouts"], ["response"], lambda table: table["response"], text
    )
    ids = pc.match_substring(index.ids, text, ignore_case=True).to_numpy(zero_copy_only=False)
    return ids | problems[index.rows["problems"]] | responses[index.rows["rollouts"]]


def _texts_contain(
    dataset: Dataset, columns: list[str], texts: Callable[[pa.Table], Any], text: str
) -> np.ndarray:
    parts = [
        pc.match_substring(texts(dataset.read_part(part, columns)), text, ignore_case=True)
        for part in range(dataset.parts)
    ]
    return np.concatenate([part.to_numpy() for part in parts])
