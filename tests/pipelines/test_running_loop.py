"""Stages within a running event loop, as in a notebook's cell, and what interrupts do to a loop."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.runtime.event_loop import EventLoop
from trace_opd.pipelines.runtime.signals import children_without_interrupt, drained, handled
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.errors import InputError, Interrupted, Stopped
from trace_opd.schemas.settings import load_config

SERVER = ["engine=openai", "api_key_env=null"]
STAGES = {
    "annotate": [f"annotator.{setting}" for setting in (*SERVER, "model=m")],
    "annotate-batch": [
        f"annotator.{setting}"
        for setting in (*SERVER, "model=m", "batch=true", "batch_poll_s=0.01")
    ],
    "rollout": ["policy.path=m", "group_size=2", *(f"sampler.{setting}" for setting in SERVER)],
    "evaluate": ["policy.path=m", "k=1", "bootstrap=100", *(f"sampler.{s}" for s in SERVER)],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_asks_servers_runs_within_a_running_loop(
    name, paid_server, make_verdicts, tmp_path: Path
):
    store: Store = make_verdicts(tmp_path, parts=2, count=3)
    store.set_alias("problems", next(store.datasets("problems")))
    stage = name.removesuffix("-batch")
    section = "annotator" if stage == "annotate" else "sampler"
    changes = [*STAGES[name], f"{section}.base_url={paid_server.url}"]
    config = load_config(REGISTRY[stage].config_type, None, changes)

    async def cell() -> Any:
        return run_stage(stage, config, store)

    made: Dataset = asyncio.run(cell())
    assert made.rows == {"annotate": 6, "rollout": 4, "evaluate": 2}[stage]
    assert paid_server.answered
    assert not [one for one in threading.enumerate() if one.name == "event loop"]


def test_in_a_notebook_a_wrong_stage_is_a_sentence_and_a_dataset_prints_as_a_line(
    make_verdicts, tmp_path: Path
):
    store: Store = make_verdicts(tmp_path, parts=1, count=3)
    config = load_config(REGISTRY["rollout"].config_type, None, ["policy.path=m"])
    with pytest.raises(InputError, match=r"stage 'annotat' is unknown; known: .*annotate"):
        run_stage("annotat", config, store)
    with pytest.raises(InputError, match="annotate takes AnnotateConfig, not RolloutConfig"):
        run_stage("annotate", config, store)
    made = next(store.datasets("problems"))
    assert repr(made) == f"Dataset({made.ref}, {made.rows} rows)"


def test_an_interrupt_of_the_caller_cancels_the_coroutine_and_the_loop_goes_on():
    cancelled, loop = [], EventLoop()

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def again() -> int:
        return 7

    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(work())
        assert cancelled == [True]
        assert loop.run(again()) == 7
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Stopped)]
)
def test_a_signal_drains_and_then_passes_to_the_handler_before(number, error):
    order = []
    with handled(lambda number: order.append(("before", number))):
        with pytest.raises(error, match="all kept"):  # noqa: PT012, SIM117
            with drained(lambda: order.append("drain"), lambda: "all kept"):
                signal.raise_signal(number)
                order.append("block")
        assert order == ["drain", "block", ("before", number)]
        with drained(lambda: None, lambda: ""):
            pass  # no signal, no exception


def test_a_child_that_must_outlive_ctrl_c_does_not_get_it():
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with children_without_interrupt():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "alive\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled(lambda number: pytest.fail("handled")):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
