"""The clock of a step's phases: their seconds, peak memory on CUDA, and names in a profile.

trainer.py starts one for each step; online.py and engines name their phases on it.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import record_function

from ..schemas.errors import Stopped

Phase = Callable[[str], None]  # called with a phase's name when that phase begins

_OTHER = "other"  # before the first phase and after the last
_GIB = 2**30


class PhaseClock:
    """Call it with a phase's name as that phase begins; a phase may begin several times.

    On CUDA a phase ends when its last kernel is queued, and not done: a phase that reads no result
    from the device leaves its seconds to the next one that does.

    Raises Stopped at the begin of a phase once `stopping` is true.
    """

    def __init__(
        self, stopping: Callable[[], bool] = lambda: False, device: torch.device | None = None
    ) -> None:
        """device: whose memory is measured; None or the CPU: no memory is."""
        self._stopping = stopping
        self._device = device if device is not None and device.type == "cuda" else None
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, int] = defaultdict(int)
        self._begin(_OTHER)

    def __call__(self, phase: str) -> None:
        # Nothing is lost before the weights change: a resumed run repeats the step.
        if phase != _OTHER and self._stopping():
            self._end()
            raise Stopped
        self._end()
        self._begin(phase)

    def metrics(self) -> dict[str, float]:
        """Ends the last phase. Returns `seconds_<phase>`, their sum with all between as `seconds`,
        and on CUDA `peak_memory_gib_<phase>` of this process's tensors.
        """
        self._end()
        out = {f"seconds_{name}": s for name, s in self._seconds.items() if name != _OTHER}
        out["seconds"] = sum(self._seconds.values())
        return out | {
            f"peak_memory_gib_{name}": peak / _GIB
            for name, peak in self._peaks.items()
            if name != _OTHER
        }

    def _begin(self, phase: str) -> None:
        self._phase = phase
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._range = record_function(phase)
        self._range.__enter__()
        self._since = time.perf_counter()

    def _end(self) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._since
        self._range.__exit__(None, None, None)
        if self._device is not None:
            peak = torch.cuda.max_memory_allocated(self._device)
            self._peaks[self._phase] = max(self._peaks[self._phase], peak)
