"""What a list of rollouts is filtered by: each facet holds a small code per rollout.

rollout_index.py makes the facets, rollout_search.py filters by them, page.py shows their counts.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.labels import AnnotationStatus, Route

_JUDGED = pa.array([AnnotationStatus.OK, AnnotationStatus.EMPTY], pa.string())
_BITS = np.min_scalar_type((1 << len(Route)) - 1)
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
    values = [value for value in pc.unique(column).to_pylist() if value is not None]
    values = [str(value) for value in sorted(values)]
    if column.null_count:
        values.append(missing)
    codes = pc.index_in(column.cast(pa.string()), value_set=pa.array(values, pa.string()))
    numbers = np.nan_to_num(codes.to_numpy(), nan=len(values) - 1)  # null becomes NaN
    return Facet(name, label, values, numbers.astype(np.int16))


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
    """The routes of each response's tokens, one bit per route: (responses,) unsigned."""
    counts = pc.list_value_length(route).to_numpy()
    bits = np.left_shift(_BITS.type(1), pc.list_flatten(route).to_numpy().astype(_BITS))
    # For an empty segment, reduceat returns the element that follows it.
    starts = np.cumsum(counts) - counts
    masks = np.bitwise_or.reduceat(np.append(bits, _BITS.type(0)), starts)
    return pa.array(np.where(counts > 0, masks, _BITS.type(0)))


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
    return np.equal(differ.to_numpy(), True)  # null, where one names none, is no difference


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
