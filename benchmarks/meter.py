"""Seconds and peak memory of a piece of work in this process."""

import ctypes
import resource
import time
from pathlib import Path

import torch

MIB = 1 << 20


def kib_of(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(f"{file} has no {field}")


def limit_to_free_memory() -> None:
    """An allocation of this process beyond the machine's memory fails instead of bringing the
    machine down.
    """
    room = kib_of("/proc/meminfo", "MemAvailable") + kib_of("/proc/self/status", "VmData")
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (room * 1024, most))


class Meter:
    """Seconds and peak of memory between `begin` and `end`.

    The resident set's high-water mark on CPU (Linux), the allocator's on CUDA.
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._began = 0.0
        self.resident_mib = 0.0  # before the work

    def begin(self) -> None:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self.resident_mib = torch.cuda.memory_allocated() / MIB
        else:
            # Memory that malloc kept would hide as much of the peak.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self.resident_mib = kib_of("/proc/self/status", "VmRSS") / 1024
        self._began = time.perf_counter()

    def end(self) -> tuple[float, float]:
        """Seconds, and the peak in MiB beyond `resident_mib`."""
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        if self._on_cuda:
            peak = torch.cuda.max_memory_allocated() / MIB
        else:
            peak = kib_of("/proc/self/status", "VmHWM") / 1024
        return seconds, peak - self.resident_mib
