"""Validation on two ranks gives the figures of one. See rehearsal.py."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config

from .torchrun import CLI, CONFIG, SHORT, ended


def validated(root: Path, ranks: int) -> tuple[pa.Table, dict]:
    """The results before the first step, and the metrics of the last."""
    store = Store(root)
    for alias, overrides in {"problems": ["limit=4"], "held-out": ["limit=5", "seed=1"]}.items():
        config = load_config(ProblemsConfig, CONFIG, overrides, "problems")
        store.set_alias(alias, run_stage("problems", config, store))
    asked = ["validation.problems={test: held-out}", "validation.k=3"]
    code, _, error = ended(ranks, "-m", CLI, "train", CONFIG, *SHORT, *asked, "--store", root)
    assert code == 0, error
    (run,) = root.glob("train/*")
    return pq.read_table(run / "validation/step-000000.parquet"), read_metrics(
        run / "metrics.jsonl"
    )[-1]


@pytest.mark.slow
def test_every_rank_validates_its_share_and_the_figures_are_those_of_one(tmp_path):
    alone, last = validated(tmp_path / "one", 1)
    together, last_of_two = validated(tmp_path / "two", 2)
    assert together.num_rows == 10  # sampled and greedy
    exact = [name for name in alone.column_names if name != "entropy"]
    assert together.select(exact) == alone.select(exact)
    for ours, theirs in zip(
        together["entropy"].to_pylist(), alone["entropy"].to_pylist(), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for name in ("validation_test_sampled", "validation_test_greedy"):
        assert last_of_two[name] == last[name]
