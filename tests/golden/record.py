"""The golden record: dataset ids, hashes and losses of a small run of the micro pipeline.

    python tests/golden/record.py     # write golden.json again after an intended change

test_golden.py compares a fresh run with golden.json, so that a refactoring shows any change.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_pipeline, run_stage
from trace_opd.schemas.configs import Config, PipelineConfig
from trace_opd.schemas.settings import load_config

FILE = Path(__file__).with_name("golden.json")
_CONFIG = Path(__file__).parents[2] / "configs" / "micro.yaml"
# Ten optimiser steps; the teacher is used in each of them.
_SMALL = [
    "problems.limit=32", "eval_problems.limit=16", "rollout.group_size=4", "evaluate.k=2",
    "train.offline.steps=5", "train.online.steps=5", "train.online.group_size=4",
    "train.groups_per_step=4",
]  # fmt: skip
_TIMES = {"seconds", "latency_s"}
# The last bits of trained weights differ between CPUs, and so do hashes of them.
_OF_TRAINED_WEIGHTS = {"policy_revision", "evaluation_id"}
_LOSSES = ("loss", "grad_norm", "entropy")


def record(root: Path) -> dict[str, Any]:
    """Run the pipeline in a store below `root` and describe each dataset."""
    torch.set_num_threads(1)
    store = Store(root / "store")

    def run(stage: str, config: Config, alias: str) -> str:
        result = run_stage(stage, config, store, alias)
        return result if isinstance(result, str) else result.ref

    refs = run_pipeline(load_config(PipelineConfig, str(_CONFIG), _SMALL), run)
    del refs["report"]
    return {role: _described(store.get(ref)) for role, ref in refs.items()}


def _described(dataset: Dataset) -> dict[str, Any]:
    if dataset.stage == "train":
        lines = dataset.local_path("metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return {"id": dataset.ref, "steps": [{key: s[key] for key in _LOSSES} for s in steps]}
    table = dataset.read()
    if dataset.stage == "evaluate":
        table = table.drop_columns(list(_OF_TRAINED_WEIGHTS))
    return {"id": dataset.ref, **_columns(table)}


def _columns(table: pa.Table) -> dict[str, Any]:
    """A hash of the columns without floats, and the mean of each column with floats, because sums
    of floats differ between CPUs.
    """
    exact = [f.name for f in table.schema if not _has_floats(f.type)]
    floats = [name for name in table.column_names if name not in {*exact, *_TIMES}]
    rows = json.dumps(table.select(exact).to_pylist(), sort_keys=True)
    return {
        "rows": len(table),
        "sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "means": {name: _mean(table[name].combine_chunks()) for name in floats},
    }


def _has_floats(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_floats(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_floating(kind)


def _mean(column: pa.Array) -> float:
    """The mean of the values that are not null; 0 if there are none."""
    flat = column.flatten() if pa.types.is_list(column.type) else column
    values = pc.drop_null(flat).to_numpy(zero_copy_only=False)
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = record(Path(folder))
    FILE.write_text(json.dumps(made, indent=1) + "\n")
