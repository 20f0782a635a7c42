"""Resume: what a SIGKILL interrupts goes on from what is finished, to the same result."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.configs import Config
from trace_opd.schemas.settings import load_config
from trace_opd.tests.kill.ends import untimed_metrics
from trace_opd.tests.kill.harness import Launcher

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
PROBLEMS = ["limit=12", "rows_per_part=3"]
ROLLOUT = ["group_size=4"]
# λ falls from step 2 to 0 at step 6; the teacher at a checkpoint is older than the student.
TRAIN = [
    "offline.steps=4",
    "online.steps=4",
    "online.group_size=4",
    "groups_per_step=3",
    "schedule.hold_steps=2",
    "schedule.decay_steps=4",
    "teacher.sync_steps=3",
    "checkpoint_every=2",
]


def config_of(stage: str, overrides: list[str]) -> Config:
    return load_config(REGISTRY[stage].config_type, CONFIG, overrides, stage)


def make(stage: str, root: Path, *overrides: str) -> Dataset:
    made = run_stage(stage, config_of(stage, list(overrides)), Store(root))
    assert isinstance(made, Dataset)
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Killed runs and undisturbed ones sum in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_when(
    forks: Launcher, stage: str, root: Path, overrides: list[str], reached: Callable[[], bool]
) -> None:
    """Run a stage in a process of its own and SIGKILL it as soon as `reached` holds."""
    deadline = time.monotonic() + 120
    run = forks.start(stage, CONFIG, *overrides, "--store", root)
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.002)
    forks.kill(run, workers=True)
    assert run.code == -signal.SIGKILL, f"ended before it could be killed: {run.err}"
    assert reached(), "never got there"


@pytest.fixture(scope="module")
def rolled(tmp_path_factory) -> Path:
    """A store with rollouts and what follows up to routed tables, made without a disturbance."""
    root = tmp_path_factory.mktemp("undisturbed")
    make("problems", root, *PROBLEMS)
    make("rollout", root, *ROLLOUT)
    for stage in ("verify", "annotate", "convert"):
        make(stage, root)
    return root


def test_a_killed_rollout_goes_on_from_its_parts_to_the_same_rows(forks, rolled, tmp_path):
    make("problems", tmp_path, *PROBLEMS)

    def parts() -> list[Path]:
        return sorted(tmp_path.glob("rollout/*/part-*.parquet"))

    kill_when(forks, "rollout", tmp_path, ROLLOUT, lambda: bool(parts()))
    kept = {part: part.stat().st_mtime_ns for part in parts()}
    assert 0 < len(kept) < 4
    assert list(Store(tmp_path).datasets("rollout")) == []

    resumed = make("rollout", tmp_path, *ROLLOUT)
    undisturbed = Store(rolled).get("rollouts")
    assert resumed.ref == undisturbed.ref
    assert resumed.read() == undisturbed.read()
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert len(parts()) == 4


def final_weights(run: Dataset) -> bytes:
    return Path(run.path("checkpoints/final/model.safetensors")).read_bytes()


@pytest.mark.slow
def test_a_training_killed_twice_ends_as_an_undisturbed_one(forks, rolled, tmp_path):
    root = Path(shutil.copytree(rolled, tmp_path / "store"))

    def steps() -> set[str]:
        return {path.name for path in root.glob("train/*/checkpoints/*step-*")}

    def logged() -> int:
        return sum(
            len(file.read_bytes().splitlines()) for file in root.glob("train/*/metrics.jsonl")
        )

    # Offline, while the second checkpoint is being written.
    kill_when(
        forks, "train", root, TRAIN, lambda: bool(steps() & {".tmp-step-00004", "step-00004"})
    )
    assert list(Store(root).datasets("train")) == []
    assert 3 <= logged() < 8
    # Online, after a step whose metrics are logged and whose weights are in no checkpoint.
    kill_when(forks, "train", root, TRAIN, lambda: "step-00006" in steps() and logged() >= 7)
    assert list(Store(root).datasets("train")) == []

    resumed = make("train", root, *TRAIN)
    undisturbed = make("train", rolled, *TRAIN)
    assert resumed.ref == undisturbed.ref
    assert final_weights(resumed) == final_weights(undisturbed)
    assert untimed_metrics(Path(resumed.path())) == untimed_metrics(Path(undisturbed.path()))
    assert [line["step"] for line in untimed_metrics(Path(resumed.path()))] == list(range(8))

    assert resumed.summary["tables"] == undisturbed.summary["tables"]
    for role, ref in resumed.summary["tables"].items():
        ours, theirs = (Store(where).get(ref).read() for where in (root, rolled))
        timings = {"seconds", "latency_s"} & set(ours.column_names)
        assert ours.drop_columns(list(timings)) == theirs.drop_columns(list(timings)), role


def test_training_changes_the_weights(rolled):
    trained = make("train", rolled, *TRAIN)
    base = Path(__file__).parents[3] / "data" / "micro" / "model.safetensors"
    assert final_weights(trained) != base.read_bytes()
    assert {line["phase"] for line in untimed_metrics(Path(trained.path()))} == {
        "offline",
        "online",
    }
    weights = [line["kl_weight"] for line in untimed_metrics(Path(trained.path()))]
    assert weights[0] == weights[1] > weights[3] > weights[5] > weights[6] == 0
