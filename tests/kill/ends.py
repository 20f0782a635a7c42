"""Asserts on the store after a disturbed run: it equals the undisturbed run's store. Used by the
kill and soak tests.
"""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from trace_opd.data.atomic import is_temporary
from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.run_metrics import read_metrics

_TIMINGS = {"seconds", "latency_s"}
# Metrics of a step that depend on the machine.
MEASURED = re.compile("second|sampling_(share|overlap)|mfu|gpu_busy|peak_memory")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_no_leftovers(root: Path) -> None:
    """No temporary file of a killed writer, no lock, no unfinished dataset."""
    left = [name for name in files(root) if is_temporary(Path(name).name) or ".locks" in name]
    assert left == []
    for folder in root.glob("*/*"):
        assert (folder / "manifest.json").exists(), folder


def assert_same_datasets(root: Path, undisturbed: Path) -> None:
    """Both stores hold the same datasets and aliases. Parts are equal byte for byte where they hold
    no timings, else row for row.
    """
    ours, theirs = Store(root), Store(undisturbed)
    assert ours.aliases() == theirs.aliases()
    expected = {dataset.ref: dataset for dataset in theirs.datasets()}
    found = {dataset.ref: dataset for dataset in ours.datasets()}
    assert found.keys() == expected.keys()
    for ref, dataset in found.items():
        assert dataset.manifest["inputs"] == expected[ref].manifest["inputs"]
        if dataset.stage == "train":
            assert_same_run(dataset, expected[ref])
            continue
        table = dataset.read()
        if not _TIMINGS & set(table.column_names):
            assert dataset.manifest["parts"] == expected[ref].manifest["parts"], ref
            assert dataset.summary == expected[ref].summary
        assert untimed(table) == untimed(expected[ref].read()), ref
        names = {name for name in files(Path(dataset.path())) if name.startswith("part")}
        assert names == {part["name"] for part in dataset.manifest["parts"]}


def untimed(table: pa.Table) -> pa.Table:
    """A table without timings: its own, and those of a reward's parts."""
    kept = table.drop_columns([name for name in table.column_names if name in _TIMINGS])
    if "parts" not in kept.column_names:
        return kept
    rows = [
        parts and [{k: v for k, v in part.items() if k not in _TIMINGS} for part in parts]
        for parts in kept["parts"].to_pylist()
    ]
    return kept.drop_columns(["parts"]).append_column("parts", pa.array(rows))


def untimed_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without those that depend on the machine."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not MEASURED.search(k)} for line in lines]


def assert_same_run(ours: Dataset, theirs: Dataset) -> None:
    """Equal weights, bit for bit; equal metrics, except times; checkpoints of the same names."""
    names = [
        {
            name
            for name in files(Path(run.path()))
            # A damaged checkpoint is set aside.
            if not any(part in name for part in ("events.out", "jsonl", "/damaged-step-"))
        }
        for run in (ours, theirs)
    ]
    assert names[0] == names[1]
    weights = [Path(run.path("checkpoints/final/model.safetensors")) for run in (ours, theirs)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert untimed_metrics(Path(ours.path())) == untimed_metrics(Path(theirs.path()))
