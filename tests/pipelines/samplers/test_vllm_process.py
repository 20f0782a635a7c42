"""Calls to vLLM's engine process: its result, its error, and its death."""

import multiprocessing
import threading
import time

import pytest

from trace_opd.pipelines.samplers.vllm_process import ask_process
from trace_opd.schemas.errors import EngineEnded


@pytest.fixture
def engine():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    yield process
    process.kill()
    process.join()


def fail() -> None:
    raise ValueError("a bad request")


def test_a_call_gives_the_engines_result_or_error(engine):
    assert ask_process([engine], lambda: 1 + 1) == 2
    with pytest.raises(ValueError, match="a bad request"):
        ask_process([engine], fail)


def test_a_call_that_blocks_ends_when_the_engines_process_dies(engine):
    threading.Timer(0.5, engine.kill).start()
    with pytest.raises(EngineEnded, match="process has ended"):
        ask_process([engine], threading.Event().wait)


def test_an_error_of_a_dead_engine_is_its_end(engine):
    engine.kill()
    engine.join()
    with pytest.raises(EngineEnded, match="process has ended"):
        ask_process([engine], fail)
