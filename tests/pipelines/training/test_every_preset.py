"""Every preset trains: two online steps of micro on two groups of four responses."""

from math import isfinite
from pathlib import Path

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.schemas.configs import ProblemsConfig, TrainConfig
from trace_opd.schemas.labels import Route
from trace_opd.schemas.presets import PRESETS
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
SMALL = [
    *("offline.steps=0", "online.steps=2", "online.group_size=4", "groups_per_step=2"),
    *("schedule.start_step=0", "tracker=none"),  # AntiSD's first five steps are GRPO's
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("presets"))


@pytest.fixture(scope="module")
def problems(store) -> Dataset:
    # Of these digits micro answers some right and some wrong.
    overrides = ["limit=4", "source.min_digits=2", "source.max_digits=4"]
    made = run_stage("problems", load_config(ProblemsConfig, CONFIG, overrides, "problems"), store)
    assert isinstance(made, Dataset)
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_its_tokens_are_taught(name, store, problems):
    overrides = [*SMALL, f"online.problems={problems.ref}"]
    config = load_config(TrainConfig, CONFIG, overrides, "train", name)
    made = run_stage("train", config, store)
    assert isinstance(made, Dataset)
    lines = list(read_metrics(made.local_path("metrics.jsonl")))
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert isfinite(line["loss"])
        assert isfinite(line["grad_norm"])
    routing = config.online.routing
    taught = {
        route.label: sum(line[f"coverage_{route.label}"] for line in lines)
        for route in (routing.key, routing.error)
        if route is not Route.GRPO
    }
    assert all(taught.values()), taught
    assert lines[0]["kl_weight"] == config.schedule.w0
    assert any(line["grad_norm"] > 0 for line in lines)
