"""Early ends of a training run lose nothing: SIGTERM, a full disk; also runs under torchrun."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trace_opd.data.dataset import get_dataset
from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
TRAIN = [
    "offline.steps=3",
    "online.steps=3",
    "online.group_size=4",
    "groups_per_step=4",
    "schedule.hold_steps=2",
    "schedule.decay_steps=3",
    "teacher.sync_steps=2",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """All runs sum in the same order, in this process and in others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stage(name: str, root: Path, *overrides: str) -> Dataset:
    made = run_stage(
        name, load_config(REGISTRY[name].config_type, CONFIG, list(overrides), name), Store(root)
    )
    assert isinstance(made, Dataset)
    return made


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """A store to train from."""
    root = tmp_path_factory.mktemp("routed")
    stage("problems", root, "limit=12", "rows_per_part=6")
    stage("rollout", root, "group_size=4")
    for name in ("verify", "annotate", "convert"):
        stage(name, root)
    return root


def copied(store: Path, folder: Path) -> Path:
    return Path(shutil.copytree(store, folder / "store"))


@pytest.fixture(scope="module")
def undisturbed(routed, tmp_path_factory) -> Dataset:
    return stage("train", copied(routed, tmp_path_factory.mktemp("undisturbed")), *TRAIN)


def start(
    root: Path, *overrides: str, ranks: int = 1, before: Callable[[], None] | None = None
) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = ["-m", "trace_opd.pipelines.cli", "train", CONFIG, *TRAIN, *overrides]
    return subprocess.Popen(
        [*launcher, *command, "--store", root],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )  # fmt: skip


def lines(root: Path) -> list[dict]:
    (folder,) = root.glob("train/*")
    return read_metrics(folder / "metrics.jsonl")


def final_weights(run: Dataset) -> bytes:
    return Path(run.path("checkpoints/final/model.safetensors")).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4], ids=["offline", "online"])
def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_end(
    forks, undisturbed, routed, tmp_path, after
):
    root = copied(routed, tmp_path)
    run = forks.start("train", CONFIG, *TRAIN, "--store", root)
    deadline = time.monotonic() + 120
    while not list(root.glob("train/*/metrics.jsonl")) or len(lines(root)) < after:
        assert time.monotonic() < deadline, run.err
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.err
    done = len(lines(root))
    assert after <= done < 6
    assert f"stopped after {done} of 6 steps" in run.err
    assert "Traceback" not in run.err
    assert [path.name for path in root.glob("train/*/checkpoints/*")] == [f"step-{done:05d}"]
    resumed = stage("train", root, *TRAIN)
    assert final_weights(resumed) == final_weights(undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_sentence_and_loses_no_checkpoint(undisturbed, routed, tmp_path):
    root = copied(routed, tmp_path)
    # The size limit of a file: the model's float32 weights are larger.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    process = start(root, "checkpoint_every=2", before=limit)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "could not be written" in stderr
    assert "Traceback" not in stderr
    assert list(root.glob("train/*/checkpoints/*")) == []
    assert final_weights(stage("train", root, *TRAIN)) == final_weights(undisturbed)


@pytest.mark.slow
def test_under_torchrun_two_processes_make_the_dataset_that_one_makes(
    undisturbed, routed, tmp_path
):
    root = copied(routed, tmp_path)
    process = start(root, ranks=2)
    out, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert out.count("  0 rows") == 1  # only rank 0 prints
    together = Store(root).get("train")
    assert together.ref == undisturbed.ref
    ours, theirs = (
        read_metrics(Path(run.path()) / "metrics.jsonl") for run in (together, undisturbed)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "reward", "tokens", "entropy"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-6)
    for run in (together, undisturbed):
        rollouts = get_dataset(run.files, run.summary["tables"]["rollouts"])
        assert (rollouts.parts, rollouts.rows) == (3, 48)
        assert set(rollouts.read()["policy_step"].to_pylist()) == {3, 4, 5}
