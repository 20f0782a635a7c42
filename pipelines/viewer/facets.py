"""What a list of rollouts is filtered by: each facet holds a small code per rollout.

rollout_index.py makes the facets, rollout_search.py filters by them, page.py shows their counts.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.labels import AnnotationStatus, Route

_JUDGED = pa.array([AnnotationStatus.OK, AnnotationStatus.EMPTY], pa.string())
NOT_ANNOTATED = "not annotated"


@dataclass(frozen=True)
class Facet:
    """codes: (rollouts,) int16 into values."""

    name: str
    label: str
    values: list[str]
    codes: np.ndarray

    def counts(self) -> list[tuple[str, int]]:
        counts = np.bincount(self.codes, minlength=len(self.values)).tolist()
        return list(zip(self.values, counts, strict=True))


def text_facet(name: str, label: str, column: pa.ChunkedArray, missing: str = "none") -> Facet:
    """A facet of a column's distinct values, sorted; null becomes `missing`, the last value."""
    if pa.types.is_boolean(column.type):
        column = pc.if_else(column, "yes", "no")
    values = [str(value) for value in sorted(pc.unique(column.drop_null()).to_pylist())]
    if column.null_count:
        values.append(missing)
    codes = pc.index_in(column.cast(pa.string()), value_set=pa.array(values, pa.string()))
    return Facet(name, label, values, pc.fill_null(codes, len(values) - 1).to_numpy().astype("i2"))


def annotation_facets(annotations: pa.Table, side: str = "") -> list[Facet]:
    """Type, status and annotator. side: " A" or " B", which of two annotators."""
    return [
        text_facet(f"{name}{'_b' if side == ' B' else ''}", f"{label}{side}", column, missing)
        for name, label, column, missing in (
            ("type", "Type", annotations["diagnostic_type"], "no type"),
            ("status", "Annotation", annotations["status"], NOT_ANNOTATED),
            ("annotator", "Annotator", annotations["annotator_name"], NOT_ANNOTATED),
        )
    ]


def route_facets(routed: pa.Table) -> list[Facet]:
    """Which routes a response's tokens take, and whether the rule dropped marked tokens."""
    masks = routed["routes"].to_numpy()
    names = {mask: _route_names(mask) for mask in np.unique(masks).tolist()}
    kept = np.where(routed["dropped_tokens"].to_numpy() > 0, "marks dropped", "marks kept")
    return [
        _coded("route", "Tokens", [names[mask] for mask in masks.tolist()]),
        _coded("cap", "Cap", kept.tolist()),
    ]


def route_masks(route: pa.ListArray) -> pa.Array:
    """The routes of each response's tokens, one bit per route: (responses,) uint64."""
    counts = pc.list_value_length(route).to_numpy()
    bits = np.left_shift(np.uint64(1), pc.list_flatten(route).to_numpy().astype(np.uint64))
    # For an empty segment, reduceat returns the element that follows it.
    starts = np.cumsum(counts) - counts
    masks = np.bitwise_or.reduceat(np.append(bits, np.uint64(0)), starts)
    return pa.array(np.where(counts > 0, masks, np.uint64(0)))


def _route_names(mask: int) -> str:
    names = [route.name.lower() for route in Route if mask >> route & 1 and route != Route.GRPO]
    return " + ".join(names) or Route.GRPO.name.lower()


def _coded(name: str, label: str, texts: list[str]) -> Facet:
    return text_facet(name, label, pa.chunked_array([pa.array(texts, pa.string())]))


# --- two annotators ------------------------------------------------------------------------------


def judged(annotations: pa.Table) -> np.ndarray:
    """(rollouts,) bool: whether the annotator answered."""
    return pc.is_in(annotations["status"], value_set=_JUDGED).to_numpy()


def types_differ(first: pa.Table, second: pa.Table) -> np.ndarray:
    """(rollouts,) bool: whether both name a type, and not the same one."""
    differ = pc.not_equal(first["diagnostic_type"], second["diagnostic_type"])
    return pc.fill_null(differ, False).to_numpy()


def agreement_facets(
    both: np.ndarray, either: np.ndarray, differ: np.ndarray, comparable: np.ndarray
) -> list[Facet]:
    """How two annotators' marks overlap, and whether their types are the same. All (rollouts,).

    both, either: marked characters; differ: `types_differ`; comparable: judged by both.
    """
    marks = np.select(
        [~comparable, both == either, both > 0], ["not comparable", "same", "partly"], "apart"
    )
    types = np.select([~comparable, differ], ["not comparable", "differ"], "same or none")
    return [
        _coded("marks", "Marks of both", marks.tolist()),
        _coded("types", "Types of both", types.tolist()),
    ]
