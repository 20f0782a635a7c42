"""Validation on two ranks gives the figures of one. See rehearsal.py."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.schemas.configs import ProblemsConfig, TrainConfig
from trace_opd.schemas.settings import load_config

from .torchrun import CONFIG, SHORT, forked

ASKED = [*SHORT, "validation.problems={test: held-out}", "validation.k=3"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process sums in the same order as the ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepared(root: Path) -> Path:
    for alias, overrides in {"problems": ["limit=4"], "held-out": ["limit=5", "seed=1"]}.items():
        config = load_config(ProblemsConfig, CONFIG, overrides, "problems")
        run_stage("problems", config, Store(root), alias)
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_rank_validates_its_share_and_the_figures_are_those_of_one(forks, tmp_path):
    one, two = prepared(tmp_path / "one"), prepared(tmp_path / "two")
    run_stage("train", load_config(TrainConfig, CONFIG, ASKED, "train"), Store(one))
    forked(forks, 2, "train", CONFIG, *ASKED, "--store", two)
    (alone,), (together,) = (list(root.glob("train/*")) for root in (one, two))
    # Before the first step, with the same weights.
    first = "validation/step-000000.parquet"
    ours, theirs = pq.read_table(together / first), pq.read_table(alone / first)
    assert ours.num_rows == 10  # sampled and greedy
    exact = [name for name in ours.column_names if name != "entropy"]
    assert ours.select(exact) == theirs.select(exact)
    for left, right in zip(*(t["entropy"].to_pylist() for t in (ours, theirs)), strict=True):
        assert left == pytest.approx(right, abs=1e-4)
    last, expected = (read_metrics(run / "metrics.jsonl")[-1] for run in (together, alone))
    for name in ("validation_test_sampled", "validation_test_greedy"):
        assert last[name] == expected[name]
