"""All rollouts of a dataset as a list shows, sorts and filters them: a few bytes for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ..visible import visible
from .facets import (
    Facet,
    agreement_facets,
    annotation_facets,
    judged,
    route_facets,
    text_facet,
    types_differ,
)
from .rollout_tables import Tables
from .row_reader import row_numbers
from .span_overlap import disagreement, overlap, read_span_ends

_SNIPPET_CHARS = 160


@dataclass(frozen=True)
class RolloutIndex:
    """Rollouts in the order of policy step, group and sample; all arrays are (rollouts,).

    rows: each rollout's row number by role of the table, −1 where a table does not hold it.
    problems: beginnings of the problems' texts, by row number of their table.
    disagreement: NaN where the annotators are not comparable; None without a second one.
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
        """What a list shows of some rollouts, as JSON-able data; facets by their codes."""
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
    """Index a dataset's rollouts. Reads no response and no column of tokens but the routes.

    against: a second annotations dataset of the same rollouts; ids: only these rollouts.
    """
    chosen = _ids(tables.lead) if ids is None else pa.array(ids, pa.string())
    rows: dict[str, np.ndarray] = {}
    columns = ["problem_id", "group_id", "sample_index", "policy_step"]
    _, sampled = _aligned(tables.by_role["rollouts"], columns, chosen)
    group = _codes(sampled["group_id"])
    sample, step = (sampled[name].to_numpy() for name in ("sample_index", "policy_step"))
    order = np.lexsort((sample, group, step))
    chosen, sampled = chosen.take(order), sampled.take(order)

    def aligned(role: str, dataset: Dataset, names: list[str]) -> pa.Table:
        rows[role], found = _aligned(dataset, names, chosen)
        return found

    aligned("rollouts", tables.by_role["rollouts"], [])
    verdicts = aligned("verdicts", tables.by_role["verdicts"], ["correct", "status"])
    facets = [text_facet("correct", "Correct", verdicts["correct"], "unscored")]
    if "routed" in tables.by_role:
        routed = aligned("routed", tables.by_role["routed"], ["dropped_tokens"])
        facets += route_facets(tables.by_role["routed"], rows["routed"], routed["dropped_tokens"])
    marked = ["diagnostic_type", "status", "annotator_name"]
    scores = None
    if "annotations" in tables.by_role:
        first = aligned("annotations", tables.by_role["annotations"], marked)
        facets += annotation_facets(first, " A" if against else "")
        if against is not None:
            second = aligned("against", against, marked)
            both, either = overlap(
                read_span_ends(tables.by_role["annotations"], rows["annotations"]),
                read_span_ends(against, rows["against"]),
                len(chosen),
            )
            comparable, differ = judged(first) & judged(second), types_differ(first, second)
            scores = disagreement(both, either, differ, comparable)
            facets += annotation_facets(second, " B")
            facets += agreement_facets(both, either, differ, comparable)
    facets.append(text_facet("verdict", "Verdict", verdicts["status"]))
    facets.append(text_facet("step", "Policy step", sampled["policy_step"]))
    problems = tables.by_role["problems"].read(["problem_id", "problem"])
    rows["problems"] = row_numbers(sampled["problem_id"].combine_chunks(), problems["problem_id"])
    return RolloutIndex(
        ids=chosen,
        rows=rows,
        problems=pc.utf8_slice_codeunits(problems["problem"], 0, _SNIPPET_CHARS).combine_chunks(),
        group=group[order],
        sample=sample[order],
        step=step[order],
        facets=tuple(facets),
        disagreement=scores,
    )


def _ids(dataset: Dataset) -> pa.Array:
    return dataset.read(["rollout_id"])["rollout_id"].combine_chunks()


def _aligned(dataset: Dataset, columns: list[str], ids: pa.Array) -> tuple[np.ndarray, pa.Table]:
    """Row number of each id, −1 if the dataset does not hold it, and columns in the ids' order."""
    held = dataset.read(["rollout_id", *columns])
    rows = row_numbers(ids, held["rollout_id"])
    return rows, held.select(columns).take(pa.array(rows, pa.int64(), mask=rows < 0))


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """A number per value, in the order in which they first occur."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy()
