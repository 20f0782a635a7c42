"""What commands print with --json: stable keys, sizes in bytes, shares from 0 to 1.

The commands call these functions and print the result with `terminal.print_data`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...data.store import MANIFEST, Dataset
from ..viewer.paint import Paint

if TYPE_CHECKING:  # a stage prints its dataset without what draws rollouts
    from ..viewer.rollout_view import RolloutView


def dataset_data(dataset: Dataset, names: Sequence[str] = ()) -> dict[str, Any]:
    """A dataset in a list: what `trace-opd ls` shows of it."""
    return {
        "dataset": dataset.ref,
        "stage": dataset.stage,
        "id": dataset.id,
        "aliases": list(names),
        "table": dataset.manifest["table"],
        "parts": dataset.parts,
        "rows": dataset.rows,
        "finished_at": dataset.manifest["finished_at"],
        "path": dataset.path(),
    }


def full_dataset_data(dataset: Dataset, names: Sequence[str] = ()) -> dict[str, Any]:
    """A dataset by itself: with its figures, config and inputs."""
    manifest = dataset.manifest
    return dataset_data(dataset, names) | {
        "summary": dataset.summary,
        "config": manifest["config"],
        "inputs": manifest["inputs"],
        "manifest": dataset.path(MANIFEST),
    }


def listing_data(
    datasets: Iterable[Dataset], names: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Datasets in the order of the table, the newest last."""
    in_order = sorted(datasets, key=lambda dataset: dataset.manifest["finished_at"])
    return [dataset_data(dataset, names.get(dataset.ref, ())) for dataset in in_order]


def lineage_data(dataset: Dataset, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A dataset with its inputs, each with its role and its own inputs."""
    path: list[dict[str, Any]] = []
    for depth, role, node in dataset.lineage():
        one = dataset_data(node, names.get(node.ref, ())) | {"role": role or None, "inputs": []}
        if depth:
            path[depth - 1]["inputs"].append(one)
        path[depth:] = [one]
    return path[0]


def rollout_data(view: "RolloutView", dataset: Dataset) -> dict[str, Any]:
    """A rollout with its spans, and its text in pieces of one route."""
    pieces = [
        {
            "text": piece.text,
            "paint": "grpo" if piece.paint is Paint.PLAIN else piece.paint.name.lower(),
            "segment": piece.segment,
        }
        for piece in view.pieces
    ]
    names = (
        *("problem_id", "problem", "answer", "source", "group", "sample", "policy", "step"),
        *("tokens", "finish", "reward", "correct", "parsed", "verdict", "annotator", "status"),
        *("type", "reflection", "error", "advantage", "coverage", "dropped", "exact"),
    )
    spans = [
        {
            "kind": span.kind,
            "rank": span.rank,
            "segments": list(span.segments),
            "kept_tokens": span.kept_tokens,
        }
        for span in view.spans
    ]
    known = {"rollout_id": view.id, "dataset": dataset.ref}
    return known | {name: getattr(view, name) for name in names} | {"spans": spans, "text": pieces}
