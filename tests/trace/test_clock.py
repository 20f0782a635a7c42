"""The clock of a step's phases."""

import time

import pytest
import torch
from torch.profiler import profile

from trace_opd.schemas.errors import Stopped
from trace_opd.trace.clock import PhaseClock


def test_seconds_of_a_phase_that_begins_twice_add_up_and_with_the_rest_make_the_step():
    start = time.perf_counter()
    clock = PhaseClock()
    for phase in ("sample", "verify", "sample"):
        clock(phase)
        time.sleep(0.01)
    metrics = clock.metrics()
    took = time.perf_counter() - start
    assert metrics.keys() == {"seconds_sample", "seconds_verify", "seconds"}
    assert metrics["seconds_sample"] >= 0.02
    assert metrics["seconds_verify"] >= 0.01
    assert metrics["seconds_sample"] + metrics["seconds_verify"] <= metrics["seconds"] <= took


def test_a_stop_is_raised_as_the_next_phase_begins():
    stop = False
    clock = PhaseClock(lambda: stop)
    clock("sample")
    stop = True
    with pytest.raises(Stopped):
        clock("train")
    assert clock.metrics().keys() == {"seconds_sample", "seconds"}


def test_phases_are_ranges_of_a_profile_around_their_operations():
    with profile() as recorded:
        clock = PhaseClock()
        clock("train")
        torch.ones(4, 4) @ torch.ones(4, 4)
        clock("sync")
        clock.metrics()
    events = {event.name: event for event in recorded.events()}
    train, product = events["train"], events["aten::mm"]
    assert train.time_range.start <= product.time_range.start
    assert product.time_range.end <= train.time_range.end <= events["sync"].time_range.start


def test_memory_is_measured_per_phase_and_on_cuda_alone(monkeypatch):
    """The counters are PyTorch's; the machine has no GPU, so their calls are recorded."""
    held = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: held.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: held["peak"])
    clock = PhaseClock(device=torch.device("cuda"))
    for phase, peak in (("sample", 3), ("train", 2), ("sample", 1)):
        clock(phase)
        held["peak"] = peak * 2**30
    metrics = clock.metrics()
    peaks = {name: gib for name, gib in metrics.items() if name.startswith("peak_")}
    assert peaks == {"peak_memory_gib_sample": 3.0, "peak_memory_gib_train": 2.0}
    assert "peak_memory_gib_train" not in PhaseClock(device=torch.device("cpu")).metrics()
