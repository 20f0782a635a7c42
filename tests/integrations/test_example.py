"""examples/trl/train.py runs as printed, and its last steps are plain GRPO."""

import json
import runpy
from pathlib import Path

import pytest

from trace_opd.trace.policy import load_policy

pytest.importorskip("trl", reason="trl is not installed; pip install -e '.[trl]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl" / "train.py"


@pytest.mark.slow
def test_the_example_trains_and_writes_a_model(example_folder: Path):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    model = example_folder / "runs" / "trl" / "model"
    load_policy(str(model), "cpu")
    state = json.loads(next(model.glob("checkpoint-*/trainer_state.json")).read_text())
    weights = [line["kl_weight"] for line in state["log_history"] if "kl_weight" in line]
    assert weights == [0.5, 0.5, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 42
