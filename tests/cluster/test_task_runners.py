"""Clusters of two worker processes make the same datasets as one process.

    make test-cluster

The slow tests are in killed_and_alone.py.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from trace_opd import flows
from trace_opd.data.store import Draft, Store
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.stages.base import Plan, close_engine, close_idle_engine
from trace_opd.schemas.errors import InputError
from trace_opd.tests.cluster.conftest import (
    STAGES,
    assert_a_killed_workers_part_is_made_again,
    checksums,
    clocks,
    config_of,
    rows,
    run_on_cluster,
)


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


def test_bad_input_in_a_worker_is_reported_as_bad_input(cluster, made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "store"))
    Path(Store(root).get("annotations").path("part-00001.parquet")).unlink()
    state = run_on_cluster(
        "convert", config_of("convert", "routing.alpha=0.5"), root, return_state=True
    )
    error = state.result(raise_on_failure=False)
    assert isinstance(error, InputError)
    assert "part-00001.parquet: file is gone" in str(error)


@pytest.mark.parametrize("cluster", ["dask"], indirect=True)
def test_a_killed_workers_part_is_made_again(cluster, made, tmp_path):
    assert_a_killed_workers_part_is_made_again(made, tmp_path)


@dataclass
class Watched:
    """An open engine that records when it is closed."""

    engine: Any
    closed: threading.Event = field(default_factory=threading.Event)

    def __call__(self, part: int) -> Any:
        return self.engine(part)

    def close(self) -> None:
        self.engine.close()
        self.closed.set()


@pytest.fixture
def watched(made, tmp_path) -> Iterator[tuple[Callable[[int], Any], list[Watched]]]:
    """Yields a function that makes a part of a dataset, and the engines opened for it."""
    root = Path(shutil.copytree(made, tmp_path / "store"))
    real = REGISTRY["convert"].load()
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
    ("name", "value", "message"),
    [
        ("TRACE_OPD_TASK_RUNNER", "kubernetes", "use threads, processes, ray or dask"),
        ("TRACE_OPD_WORKERS", "many", "use 1 or more"),
        ("TRACE_OPD_WORKERS", "0", "use 1 or more"),
    ],
)
def test_a_bad_task_runner_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}: .*{message}"):
        flows.task_runner()
