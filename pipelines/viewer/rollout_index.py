"""All rollouts of a dataset as a list shows, sorts and filters them: a few bytes per rollout.

view.py keeps one index per server, report_page.py makes one of the rollouts it draws, and
rollout_view.load_rollouts one of the rollouts that the terminal shows. Why not SQL over the parts:
docs/decisions/viewer-index.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ..terminal import visible
from .facets import (
    Facet,
    agreement_facets,
    annotation_facets,
    judged,
    route_facets,
    route_masks,
    text_facet,
    types_differ,
)
from .rollout_tables import Tables
from .span_overlap import disagreement, overlap, span_ends

_SNIPPET_CHARS = 160
_MARKS = ["rollout_id", "diagnostic_type", "status", "annotator_name"]
_COLUMNS = {
    "routed": ["rollout_id", "dropped_tokens", "route"],
    "annotations": _MARKS,
    "verdicts": ["rollout_id", "correct", "status"],
    "rollouts": ["rollout_id", "problem_id", "group_id", "sample_index", "policy_step"],
    "problems": ["problem_id", "problem"],
}
SELECTION = ["selection", "left_out"]  # of verdicts that stage select has seen
_SPAN_ENDS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))


@dataclass(frozen=True)
class RolloutIndex:
    """Rollouts in the order of policy step, group and sample; all arrays are (rollouts,).

    rows: each rollout's row number in the table of each role, −1 if the table does not hold it.
    problems: the first characters of each problem, by row number of the problems table.
    disagreement: NaN where the annotators are not comparable; None without a second annotator.
    """

    ids: pa.Array
    rows: dict[str, np.ndarray]
    problems: pa.Array
    group: np.ndarray
    sample: np.ndarray
    step: np.ndarray
    facets: tuple[Facet, ...]
    disagreement: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    def entries(self, positions: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """What a list shows of some rollouts, as JSON-able data; facets as codes."""
        return [
            {
                "id": self.ids[i].as_py(),
                "problem": visible(self.problems[int(self.rows["problems"][i])].as_py()),
                "group": int(self.group[i]),
                "sample": int(self.sample[i]),
                "step": int(self.step[i]),
                "disagreement": self._known_disagreement(i),
                "facets": [int(facet.codes[i]) for facet in self.facets],
            }
            for i in map(int, positions)
        ]

    def members(self, position: int) -> list[dict[str, Any]]:
        """All rollouts of a rollout's group, itself included: id and whether it is right."""
        correct = next(facet for facet in self.facets if facet.name == "correct")
        return [
            {"id": self.ids[i].as_py(), "correct": correct.values[correct.codes[i]]}
            for i in np.flatnonzero(self.group == self.group[position]).tolist()
        ]

    def _known_disagreement(self, position: int) -> float | None:
        if self.disagreement is None or np.isnan(self.disagreement[position]):
            return None
        return round(float(self.disagreement[position]), 4)


def build_index(
    tables: Tables, against: Dataset | None = None, ids: Sequence[str] | None = None
) -> RolloutIndex:
    """Index a dataset's rollouts. Reads no response, and of the tokens' columns only the routes.

    against: a second annotations dataset of the same rollouts; ids: only these rollouts.

    Raises:
        InputError: a part is missing; DamagedFile: a part is damaged.
    """
    columns = _COLUMNS | ({"annotations": [*_MARKS, "spans"]} if against is not None else {})
    if tables.by_role["verdicts"].stage == "select":
        columns |= {"verdicts": columns["verdicts"] + SELECTION}
    held = {role: _read(dataset, columns[role]) for role, dataset in tables.by_role.items()}
    if against is not None:
        held["against"] = _read(against, columns["annotations"])
    lead = next(iter(held.values()))["rollout_id"].combine_chunks()
    chosen = lead if ids is None else pa.array(ids, pa.string())
    problems = held.pop("problems")
    aligned = _aligned(held["rollouts"], chosen)
    group = aligned["group_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    sample, step = (aligned[name].to_numpy() for name in ("sample_index", "policy_step"))
    order = np.lexsort((sample, group, step))
    chosen = chosen.take(order)
    found = {role: _aligned(table, chosen) for role, table in held.items()}
    rows = {role: table["row"].to_numpy() for role, table in found.items()}
    rows["problems"] = row_numbers(
        found["rollouts"]["problem_id"].combine_chunks(), problems["problem_id"]
    )
    facets, scores = _facets(found)
    return RolloutIndex(
        ids=chosen,
        rows=rows,
        problems=problems["problem"].combine_chunks(),
        group=group[order],
        sample=sample[order],
        step=step[order],
        facets=tuple(facets),
        disagreement=scores,
    )


def _facets(found: dict[str, pa.Table]) -> tuple[list[Facet], np.ndarray | None]:
    """The page's facets in its order, and the disagreement of two annotators."""
    facets = [text_facet("correct", "Correct", found["verdicts"]["correct"], "unscored")]
    scores = None
    if "routed" in found:
        facets += route_facets(found["routed"])
    if "against" in found:
        first, second = found["annotations"], found["against"]
        ends = [span_ends(side["spans"].combine_chunks()) for side in (first, second)]
        both, either = overlap(ends[0], ends[1], len(first))
        comparable, differ = judged(first) & judged(second), types_differ(first, second)
        scores = disagreement(both, either, differ, comparable)
        facets += annotation_facets(first, " A") + annotation_facets(second, " B")
        facets += agreement_facets(both, either, differ, comparable)
    elif "annotations" in found:
        facets += annotation_facets(found["annotations"])
    facets.append(text_facet("verdict", "Verdict", found["verdicts"]["status"]))
    if "selection" in found["verdicts"].column_names:
        facets.append(text_facet("selection", "Selection", found["verdicts"]["selection"]))
        left_out = found["verdicts"]["left_out"]
        facets.append(text_facet("left_out", "Left out", left_out, "selected"))
    facets.append(text_facet("step", "Policy step", found["rollouts"]["policy_step"]))
    return facets, scores


def _read(dataset: Dataset, columns: list[str]) -> pa.Table:
    """Some columns of a table, each part read once; lists and long texts keep what a list needs."""
    return pa.concat_tables(
        _shortened(dataset.read_part(part, columns)) for part in range(dataset.parts)
    )


def _shortened(part: pa.Table) -> pa.Table:
    shorter = {
        "route": lambda column: ("routes", route_masks(column)),
        "spans": lambda column: ("spans", column.cast(_SPAN_ENDS)),
        "problem": lambda column: ("problem", pc.utf8_slice_codeunits(column, 0, _SNIPPET_CHARS)),
    }
    for index, name in enumerate(part.column_names):
        if name in shorter:
            part = part.set_column(index, *shorter[name](part[name].combine_chunks()))
    return part


def _aligned(held: pa.Table, ids: pa.Array) -> pa.Table:
    """A table's rows in the order of some ids, and their numbers as column row.

    Where the table does not hold an id, row is −1 and every other column null.
    """
    rows = row_numbers(ids, held["rollout_id"])
    taken = held.take(pa.array(rows, pa.int64(), mask=rows < 0))
    return taken.append_column("row", pa.array(rows))


def row_numbers(ids: pa.Array, held: pa.ChunkedArray) -> np.ndarray:
    """Where ids are in a table's id column: (ids,) int64, −1 for those it does not hold."""
    found = pc.index_in(ids, value_set=held).to_numpy(zero_copy_only=False)  # null becomes NaN
    return np.nan_to_num(found, nan=-1).astype(np.int64)
