"""The table stages on clusters of two worker processes, Dask's and Ray's: the same datasets as here."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trace_opd import flows
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.stage import Plan, close_engine, close_idle_engine
from trace_opd.pipelines.stages import TABLE_STAGES, run_stage
from trace_opd.schemas.configs import Config, PipelineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config, override

ROOT = Path(__file__).parents[1]
STAGES = ("problems", "rollout", "verify", "annotate", "convert")
SMALL = ["problems.limit=6", "problems.rows_per_part=2", "rollout.group_size=4"]
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
    """Columns that a clock fills."""
    names = dataset.read_part(0).column_names
    return [name for name in ("seconds", "latency_s") if name in names]


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return dataset.read().drop_columns(clocks(dataset)).to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store filled in this process, by one thread as a cluster's workers have it."""
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
    """Two worker processes that outlive flow runs: the environment that finds them."""
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
    """The stage's flow, its parts made by the runner that the environment names."""
    stage_flow = flows.STAGE_FLOWS[stage].with_options(task_runner=flows.task_runner())
    return stage_flow(config, store=str(root), **options)


@pytest.mark.slow
def test_a_cluster_makes_what_this_process_makes(cluster, made, tmp_path):
    for stage in STAGES:
        run_on_cluster(stage, config_of(stage), tmp_path)
    for here in Store(made).datasets():
        there = Store(tmp_path).get(here.ref)
        assert rows(there) == rows(here)
        if not clocks(here):
            assert checksums(there) == checksums(here)
    assert Store(tmp_path).aliases() == Store(made).aliases()


def test_bad_input_in_a_worker_is_told_as_such_and_not_tried_again(cluster, made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "store"))
    Path(Store(root).get("annotations").path("part-00001.parquet")).unlink()
    state = run_on_cluster(
        "convert", config_of("convert", "routing.alpha=0.5"), root, return_state=True
    )
    error = state.result(raise_on_failure=False)
    assert isinstance(error, InputError)
    assert "part-00001.parquet: file is gone" in str(error)


@pytest.mark.slow
def test_workers_report_to_the_runs_own_temporary_server(cluster, made, environment, tmp_path):
    """And what a worker says of bad input ends the command with one sentence and exit code 2."""
    root = Path(shutil.copytree(made, tmp_path / "store"))
    shutil.rmtree(root / "convert")
    part = Path(Store(root).get("annotations").path("part-00001.parquet"))
    part.unlink()
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(CONFIG.model_dump(mode="json")))
    variables = environment | cluster | {"PREFECT_HOME": str(tmp_path / "prefect")}
    del variables["PREFECT_API_URL"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "trace_opd.flows",
        str(file),
        "--run",
        "--store",
        str(root),
    ]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=150, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert f"\ntrace-opd: {part}: file is gone" in done.stderr, said
    assert said.count("Starting temporary server") == 1
    assert len(list(root.glob("convert/*/part-*.parquet"))) == 2


def test_a_killed_workers_part_is_made_again(cluster, made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "store"))
    config = config_of("convert", "routing.rule=test_rules:kills_its_process_once")
    there = Store(root).get(run_on_cluster("convert", config, root))
    assert Path(os.environ["TEST_KILLED"]).exists()
    here = run_here("convert", config, Path(shutil.copytree(made, tmp_path / "here")))
    assert here.ref == there.ref
    assert checksums(here) == checksums(there)


@dataclass
class Watched:
    """An open engine that tells when it is closed."""

    engine: Any
    closed: threading.Event = field(default_factory=threading.Event)

    def __call__(self, part: int) -> Any:
        return self.engine(part)

    def close(self) -> None:
        self.engine.close()
        self.closed.set()


@pytest.fixture
def watched(made, tmp_path) -> Iterator[tuple[Callable[[int], Any], list[Watched]]]:
    """Makes a part of a dataset; and the engines that were opened for that."""
    root = Path(shutil.copytree(made, tmp_path / "store"))
    real = TABLE_STAGES["convert"]
    engines: list[Watched] = []

    def open_engine(plan: Plan, draft: Draft) -> Watched:
        engines.append(Watched(real.open(plan, draft)))
        return engines[-1]

    stage = replace(real, open=open_engine)
    plan, draft = stage.begin(config_of("convert", "routing.alpha=0.5"), Store(root))
    assert isinstance(draft, Draft)
    yield lambda part: stage.make_part(plan, draft, part), engines
    close_engine()


def test_an_engine_that_no_part_uses_is_closed(watched):
    make, engines = watched
    make(0)
    close_idle_engine(0.01)
    assert engines[0].closed.wait(60)
    make(1)
    assert len(engines) == 2


def test_an_engine_that_went_on_is_not_closed_for_an_earlier_wait(watched):
    make, engines = watched
    before = set(threading.enumerate())
    make(0)
    close_idle_engine(1.5)
    (timer,) = set(threading.enumerate()) - before
    make(1)
    timer.join()
    assert [engine.closed.is_set() for engine in engines] == [False]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TRACE_OPD_TASK_RUNNER", "kubernetes", "use threads, processes, ray or dask"),
        ("TRACE_OPD_WORKERS", "many", "use 1 or more"),
        ("TRACE_OPD_WORKERS", "0", "use 1 or more"),
    ],
)
def test_a_bad_task_runner_is_refused(monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}: .*{told}"):
        flows.task_runner()
