"""Rates of a step, from seconds and counts that are known."""

import threading
import time

import pytest
import torch

from trace_opd.trace import utilisation
from trace_opd.trace.utilisation import GpuBusy, over_ranks, sampling_rates, throughput

TIMED = {"seconds": 10.0, "seconds_sample": 6.0, "seconds_train": 2.0}


def test_mfu_is_of_phase_train_and_tokens_of_the_whole_step():
    rates = throughput(4000, flops=8e12, timed=TIMED, gpus=4, peak=1e12)
    assert rates == {
        "tokens_per_second": 400.0,
        "tokens_per_second_per_gpu": 100.0,
        "mfu": 1.0,  # 8e12 operations, 2 s, 4 GPUs of 1e12 a second
    }


@pytest.mark.parametrize("unknown", [{"flops": None}, {"peak": None}])
def test_without_a_count_or_a_peak_there_is_no_mfu(unknown):
    known = {"flops": 8e12, "timed": TIMED, "gpus": 1, "peak": 1e12}
    assert "mfu" not in throughput(4000, **(known | unknown))


def test_on_the_cpu_there_are_tokens_per_second_alone():
    assert throughput(4000, 8e12, TIMED, 0, None) == {"tokens_per_second": 400.0}


def test_the_share_of_a_step_that_took_turns_has_no_overlap():
    assert sampling_rates(TIMED, {}) == {"sampling_share": 0.6}
    assert sampling_rates({"seconds": 3.0, "seconds_read": 1.0}, {}) == {}


@pytest.mark.parametrize(
    ("waited", "overlap"),
    [
        (0.0, 1.0),  # made before the trainer asked for it
        (2.0, 1.0),  # the trainer waited while it was verified
        (5.0, 0.5),  # 3 of 8 seconds were hidden, all of them sampling
        (8.0, 0.0),
    ],
)
def test_overlap_is_the_part_of_sampling_before_the_trainer_waits(waited, overlap):
    timed = {"seconds": 12.0, "seconds_wait": waited}
    ahead = {"seconds_sample": 6.0, "seconds_verify": 2.0}
    rates = sampling_rates(timed, ahead)
    assert rates["sampling_share"] == 0.5
    assert rates["sampling_overlap"] == pytest.approx(overlap)


def test_ranks_give_the_largest_peak_the_mean_share_and_the_first_ones_seconds():
    first = {"seconds": 2.0, "peak_memory_gib_train": 3.0, "gpu_busy": 0.5}
    second = {"seconds": 1.0, "peak_memory_gib_train": 4.0, "gpu_busy": 0.7}
    assert over_ranks([first, second]) == {
        "seconds": 2.0, "peak_memory_gib_train": 4.0, "gpu_busy": pytest.approx(0.6),
    }  # fmt: skip


def test_without_a_gpu_nothing_is_polled():
    busy = GpuBusy(torch.device("cpu"))
    assert busy.metrics() == {}
    busy.close()


def test_a_gpu_is_polled_until_the_end_and_one_without_the_figure_is_not(monkeypatch):
    """The machine has no GPU: its answers are given."""
    monkeypatch.setattr(utilisation, "_POLL_S", 0.001)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 80)
    busy = GpuBusy(torch.device("cuda"))
    while not (metrics := busy.metrics()):
        time.sleep(0.001)
    assert metrics == {"gpu_busy": pytest.approx(0.8)}
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "gpu-busy"]
    busy.close()
    thread.join(10)
    assert not thread.is_alive()

    def fails(device: torch.device) -> int:
        raise ArithmeticError  # as pynvml's errors: of no class that is known here

    monkeypatch.setattr(torch.cuda, "utilization", fails)
    GpuBusy(torch.device("cuda"))
    assert "gpu-busy" not in [thread.name for thread in threading.enumerate()]
