"""Two ranks stop at one step of a collapse: one sentence, one checkpoint, exit code 3."""

from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config

from .torchrun import CONFIG, OURS, SHORT, ended, sentences

# Limits that ordinary steps pass.
STOPPING = [
    *SHORT, "online.steps=6", "optim.lr=1.0e-3", "stop_on_collapse=true",
    "collapse.baseline_steps=1", "collapse.window_steps=1", "collapse.entropy_ratio=1.01",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_with_one_checkpoint(tmp_path: Path):
    config = load_config(ProblemsConfig, CONFIG, ["limit=4"], "problems")
    run_stage("problems", config, Store(tmp_path), "problems")
    words = ["train", CONFIG, *STOPPING, "--store", tmp_path]
    code, _, error = ended(2, *words, launcher=OURS)
    assert code == 3, error
    (line,) = sentences(error)
    assert "stopped after a collapse: " in line
    (run,) = tmp_path.glob("train/*")
    done = len(read_metrics(run / "metrics.jsonl"))
    assert done < 6
    assert f", step {done - 1}: " in line
    assert [path.name for path in run.glob("checkpoints/*")] == [f"step-{done:05d}"]
    again, _, error = ended(2, *words, launcher=OURS)  # the resumed run is still collapsed
    assert (again, sentences(error)) == (3, [line])
    assert len(read_metrics(run / "metrics.jsonl")) == done
