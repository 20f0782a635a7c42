"""Fixtures of the cluster tests: Dask and Ray clusters of two worker processes, and a store that
was filled without a cluster. Used by `make test-cluster`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trace_opd import flows
from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import Config, PipelineConfig
from trace_opd.schemas.settings import load_config, override

ROOT = Path(__file__).parents[2]
STAGES = ("problems", "rollout", "verify", "select", "annotate", "convert")
SMALL = [
    "problems.limit=6", "problems.rows_per_part=2", "rollout.group_size=4", "select={}"
]  # fmt: skip
CONFIG: PipelineConfig = load_config(PipelineConfig, ROOT / "configs" / "micro.yaml", SMALL)
RULE = """
import os
import signal
from pathlib import Path

import numpy as np


def kills_its_process_once(response):
    try:
        Path(os.environ["TEST_KILLED"]).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        return np.full(response.tokens, -1)
"""


def config_of(stage: str, *overrides: str) -> Config:
    return override(getattr(CONFIG, stage), list(overrides))


def run_here(stage: str, config: Config, root: Path) -> Dataset:
    made = run_stage(stage, config, Store(root))
    assert isinstance(made, Dataset)
    return made


def checksums(dataset: Dataset) -> list[str]:
    return [part["sha256"] for part in dataset.manifest["parts"]]


def clocks(dataset: Dataset) -> list[str]:
    """Columns whose values are times."""
    names = dataset.read_part(0).column_names
    return [name for name in ("seconds", "latency_s") if name in names]


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return dataset.read().drop_columns(clocks(dataset)).to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store filled in this process, with one thread, like a cluster's worker."""
    root = tmp_path_factory.mktemp("here") / "store"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for stage in STAGES:
            run_here(stage, config_of(stage), root)
    finally:
        torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="module", params=["dask", "ray"])
def cluster(request, environment, tmp_path_factory) -> Iterator[dict[str, str]]:
    """Two worker processes that outlive flow runs; yields the variables that find them."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "test_rules.py").write_text(RULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("TEST_KILLED", str(folder / "killed"))
        patch.setenv("TRACE_OPD_TASK_RUNNER", request.param)
        variables = {"TRACE_OPD_TASK_RUNNER": request.param}
        if request.param == "dask":
            from distributed import LocalCluster

            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as started:
                patch.setenv("DASK_SCHEDULER_ADDRESS", started.scheduler_address)
                yield variables | {"DASK_SCHEDULER_ADDRESS": started.scheduler_address}
        else:
            import ray

            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_AUTH_MODE", "disabled")
            started = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            try:
                yield variables | {"RAY_ADDRESS": started.address_info["gcs_address"]}
            finally:
                ray.shutdown()


def run_on_cluster(stage: str, config: Config, root: Path, **options: Any) -> Any:
    """Run the stage's flow; the task runner that the environment names makes the parts."""
    stage_flow = flows.STAGE_FLOWS[stage].with_options(task_runner=flows.task_runner())
    return stage_flow(config, store=str(root), **options)


def assert_a_killed_workers_part_is_made_again(made: Path, folder: Path) -> None:
    root = Path(shutil.copytree(made, folder / "store"))
    config = config_of("convert", "routing.rule=test_rules:kills_its_process_once")
    there = Store(root).get(run_on_cluster("convert", config, root))
    assert Path(os.environ["TEST_KILLED"]).exists()
    here = run_here("convert", config, Path(shutil.copytree(made, folder / "here")))
    assert here.ref == there.ref
    assert checksums(here) == checksums(there)
