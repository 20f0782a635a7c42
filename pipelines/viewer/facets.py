"""What a list of rollouts is filtered by: per facet a small code for each rollout."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.labels import AnnotationStatus, Route

_JUDGED = pa.array([AnnotationStatus.OK, AnnotationStatus.EMPTY], pa.string())
NOT_ANNOTATED = "not annotated"


@dataclass(frozen=True)
class Facet:
    """One thing to filter by. codes: (rollouts,) int16 into values."""

    name: str
    label: str
    values: list[str]
    codes: np.ndarray

    def counts(self) -> list[tuple[str, int]]:
        counts = np.bincount(self.codes, minlength=len(self.values)).tolist()
        return list(zip(self.values, counts, strict=True))


def text_facet(name: str, label: str, column: pa.ChunkedArray, missing: str = "none") -> Facet:
    """A facet of a column's values in their order; null becomes `missing`."""
    if pa.types.is_boolean(column.type):
        column = pc.if_else(column, "yes", "no")
    values = [value for value in pc.unique(column).to_pylist() if value is not None]
    values = [str(value) for value in sorted(values)]
    if column.null_count:
        values.append(missing)
    codes = pc.index_in(column.cast(pa.string()), value_set=pa.array(values, pa.string()))
    # Null becomes NaN, and stands for the last value.
    numbers = np.nan_to_num(codes.to_numpy(), nan=len(values) - 1)
    return Facet(name, label, values, numbers.astype(np.int16))


def annotation_facets(annotations: pa.Table, side: str = "") -> list[Facet]:
    """Type, status and annotator. side: which of two annotators, at the end of their labels."""
    suffix = "_b" if side.endswith("B") else ""
    return [
        text_facet(f"type{suffix}", f"Type{side}", annotations["diagnostic_type"], "no type"),
        text_facet(f"status{suffix}", f"Annotation{side}", annotations["status"], NOT_ANNOTATED),
        text_facet(
            f"annotator{suffix}",
            f"Annotator{side}",
            annotations["annotator_name"],
            NOT_ANNOTATED,
        ),
    ]


def route_facets(routed: Dataset, rows: np.ndarray, dropped: pa.ChunkedArray) -> list[Facet]:
    """Which routes a response's tokens are on, and whether the rule left marked tokens out."""
    masks = np.concatenate([_route_masks(routed, part) for part in range(routed.parts)])[rows]
    values = {mask: _route_names(mask) for mask in np.unique(masks).tolist()}
    kept = np.where(dropped.to_numpy() > 0, "marks dropped", "marks kept")
    return [
        _coded("route", "Tokens", (values[mask] for mask in masks.tolist())),
        _coded("cap", "Cap", kept.tolist()),
    ]


def _route_masks(routed: Dataset, part: int) -> np.ndarray:
    """Per response of a part the routes of its tokens, a bit each."""
    column = routed.read_part(part, ["route"])["route"].combine_chunks()
    counts = pc.list_value_length(column).to_numpy()
    bits = np.left_shift(1, pc.list_flatten(column).to_numpy().astype(np.uint8))
    # Where a segment is empty, reduceat gives the element that follows instead of nothing.
    starts = np.cumsum(counts) - counts
    bits = np.append(bits, 0).astype(np.uint8)
    return np.where(counts > 0, np.bitwise_or.reduceat(bits, starts), 0)


def _route_names(mask: int) -> str:
    names = [route.name.lower() for route in Route if mask >> route & 1 and route != Route.GRPO]
    return " + ".join(names) or Route.GRPO.name.lower()


def _coded(name: str, label: str, texts: Iterable[str]) -> Facet:
    return text_facet(name, label, pa.chunked_array([pa.array(texts, pa.string())]))


# --- two annotators ------------------------------------------------------------------------------


def judged(annotations: pa.Table) -> np.ndarray:
    """Whether the annotator looked and answered: (rollouts,) bool."""
    return pc.is_in(annotations["status"], value_set=_JUDGED).to_numpy()


def types_differ(first: pa.Table, second: pa.Table) -> np.ndarray:
    """Whether both name a type, and not the same: (rollouts,) bool."""
    differ = pc.not_equal(first["diagnostic_type"], second["diagnostic_type"])
    return differ.to_numpy().astype(bool)  # null, where one names none, is no difference


def agreement_facets(
    both: np.ndarray, either: np.ndarray, differ: np.ndarray, comparable: np.ndarray
) -> list[Facet]:
    """How two annotators' marks lie to each other, and whether their types are the same.

    both, either: marked characters; differ: types_differ; comparable: judged by both. (rollouts,)
    """
    marks = np.select(
        [~comparable, both == either, both > 0], ["not comparable", "same", "partly"], "apart"
    )
    types = np.select([~comparable, differ], ["not comparable", "differ"], "same or none")
    return [
        _coded("marks", "Marks of both", marks.tolist()),
        _coded("types", "Types of both", types.tolist()),
    ]
