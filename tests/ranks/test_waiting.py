"""One rank works for long while the others wait, or ends while they wait."""

import signal
import time
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config

from .torchrun import CLI, ROOT, children, ended, launcher, started

CONFIG = ROOT / "configs" / "micro.yaml"
DEVICE_TIMEOUT_S, WORK_S = 4, 6
OWN = """
import time
from trace_opd.pipelines.annotators.rows import Reading

class Slow:
    def __init__(self, options):
        self.seconds = options["seconds"]

    def annotate(self, items):
        print("annotating", flush=True)
        time.sleep(self.seconds)
        return [Reading("ok", [[0]], "case_analysis") for _ in items]

    def close(self):
        time.sleep(min(self.seconds, 6))

class Wrong(Slow):
    def annotate(self, items):
        raise ValueError("no such span")
"""
# Stage train, whose collectives on the devices give up after some seconds.
PROGRAM = """
import sys
from datetime import timedelta
from trace_opd.data.store import Store
from trace_opd.pipelines.stages import train
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.settings import load_config
from trace_opd.trace import ranks

waits_in, seconds, root, config, *overrides = sys.argv[1:]
if waits_in == "devices":
    ranks._waiting_group = lambda hours: None
ranks.join_ranks("cpu", device_timeout=timedelta(seconds=float(seconds)))
train.run(load_config(TrainConfig, config, overrides, "train"), Store(root))
"""
TRAIN = [
    "offline.steps=0",
    "online.steps=2",
    "online.group_size=2",
    "groups_per_step=2",
    "tracker=none",
]


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "program.py").write_text(PROGRAM)
    config = load_config(ProblemsConfig, CONFIG, ["limit=4"], "problems")
    run_stage("problems", config, Store(tmp_path / "store"))
    return tmp_path


def own(root: Path, name: str, seconds: int = 0) -> str:
    code = f"{root}/own.py:{name}"
    return f"online.annotator={{engine: '{code}', options: {{seconds: {seconds}}}}}"


@pytest.mark.slow
@pytest.mark.parametrize("waits_in", ["gloo", "devices"])
def test_ranks_wait_for_an_annotator_longer_than_for_a_device(root, waits_in):
    """The annotator works twice, and closes, each longer than the devices' time-out."""
    store, annotator = root / "store", own(root, "Slow", WORK_S)
    program = [root / "program.py", waits_in, DEVICE_TIMEOUT_S, store, CONFIG]
    code, _, error = ended(2, *program, *TRAIN, annotator)
    if waits_in == "gloo":
        assert code == 0, error
        assert len(list(store.glob("train/*/manifest.json"))) == 1
    else:
        assert code != 0
        assert "Timed out waiting" in error
