"""A profile of one step: a Chrome trace with the step's phases, in the run's folder."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import METRICS, read_metrics
from trace_opd.pipelines.stages import REGISTRY, train
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
OVERRIDES = [
    "offline.steps=0", "online.steps=2", "groups_per_step=2", "online.group_size=2",
    "online.sampling.max_new_tokens=24", "tracker=none",
]  # fmt: skip


def config_of(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIG, [*OVERRIDES, *overrides], "train")


def test_one_step_leaves_a_trace_with_its_phases_as_ranges(tmp_path, caplog):
    store = Store(tmp_path)
    problems = load_config(REGISTRY["problems"].config_type, CONFIG, ["limit=4"], "problems")
    run_stage("problems", problems, store)
    with caplog.at_level(logging.INFO):
        done = train.run(config_of("profile_step=1"), store)
    folder = Path(done.path(METRICS)).parent
    (trace,) = folder.glob("profile-*")
    assert trace.name == "profile-step-1.json.gz"
    assert f"step 1: its profile is in {trace}" in caplog.text
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X"}
    _, step = read_metrics(folder / METRICS)
    phases = [name.removeprefix("seconds_") for name in step if name.startswith("seconds_")]
    assert {"sample", "verify", "route", "prepare", "sync", "train"} <= set(phases)
    assert set(phases) <= ranges.keys()
    begin, end = ranges["train"]
    products = [e["ts"] for e in events if e["name"] == "aten::mm" and begin <= e["ts"] <= end]
    assert products  # the operations of a phase lie within it


def test_the_profile_changes_no_id_and_names_a_step_that_there_is():
    assert config_of("profile_step=1").semantic() == config_of().semantic()
    with pytest.raises(InputError, match="the last step is 1; name one of 0 … 1"):
        config_of("profile_step=2")
