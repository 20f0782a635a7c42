"""How well a step uses the GPUs: MFU, tokens per second and GPU, busy share, share of sampling.

trainer.py adds these to a step's metrics. A figure that cannot be known here is left out: on the
CPU there is no MFU, no throughput per GPU and no busy share.
"""

import threading
from collections.abc import Mapping, Sequence

import torch

_POLL_S = 1.0  # NVML averages over its last sample period, 1/6 s to 1 s

Metrics = Mapping[str, float]


def throughput(
    tokens: float, flops: float | None, timed: Metrics, gpus: int, peak: float | None
) -> dict[str, float]:
    """A step's rates.

    tokens: of all responses. flops: of the step's forward and backward passes over all GPUs
    (`ModelFlops.step`). timed: of `PhaseClock.metrics`. gpus: those that train; 0 on the CPU. peak:
    FLOP/s of each.

    `tokens_per_second` and `tokens_per_second_per_gpu` are response tokens over the whole step,
    sampling included. `mfu` is over phase train alone, as verl's perf/mfu/actor: forward and
    backward passes, the teacher's too, and the optimiser.
    """
    rates = {"tokens_per_second": tokens / timed["seconds"]}
    if gpus:
        rates["tokens_per_second_per_gpu"] = rates["tokens_per_second"] / gpus
    if gpus and flops and peak:
        rates["mfu"] = flops / (timed["seconds_train"] * gpus * peak)
    return rates


def sampling_rates(timed: Metrics, ahead: Metrics) -> dict[str, float]:
    """Share of a step spent sampling, and how much of it training hid.

    timed: of `PhaseClock.metrics`. ahead: seconds of the phases that made the step while the one
    before it trained; empty where none was made ahead.

    `sampling_share` is seconds of sampling over the step's seconds: 1 under one step ahead means
    that the sampler never rests. `sampling_overlap`, of steps made ahead, is the share of sampling
    that passed before the trainer began to wait.
    """
    sampled = ahead.get("seconds_sample", timed.get("seconds_sample"))
    if not sampled:
        return {}
    rates = {"sampling_share": sampled / timed["seconds"]}
    if ahead:
        made = sum(s for name, s in ahead.items() if name.startswith("seconds_"))
        hidden = made - timed.get("seconds_wait", 0.0)
        rates["sampling_overlap"] = min(max(hidden / sampled, 0.0), 1.0)
    return rates


def over_ranks(measured: Sequence[Metrics]) -> dict[str, float]:
    """One rank's measurements each, to those of the step: the first's seconds, the largest peak of
    memory, the mean busy share.
    """
    together = dict(measured[0])
    for name in dict.fromkeys(name for own in measured for name in own):
        values = [own[name] for own in measured if name in own]
        if name.startswith("peak_memory_gib_"):
            together[name] = max(values)
        elif name == "gpu_busy":
            together[name] = sum(values) / len(values)
    return together


class GpuBusy:
    """Share of time in which the GPU ran a kernel, of whichever process, by NVML.

    A thread asks `torch.cuda.utilization` every second, where that works: it needs CUDA and the
    package nvidia-ml-py (on AMD amdsmi).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._shares = device, list[float]()
        self._closing = threading.Event()
        if device.type == "cuda" and self._share() is not None:
            threading.Thread(target=self._poll, name="gpu-busy", daemon=True).start()

    def metrics(self) -> dict[str, float]:
        """`gpu_busy`, the mean since the last call; nothing if no second has passed since."""
        shares, self._shares = self._shares, []
        return {"gpu_busy": sum(shares) / len(shares)} if shares else {}

    def close(self) -> None:
        self._closing.set()

    def _poll(self) -> None:
        while not self._closing.wait(_POLL_S):
            if (share := self._share()) is not None:
                self._shares.append(share)

    def _share(self) -> float | None:
        try:
            return torch.cuda.utilization(self._device) / 100
        except Exception:  # no NVML, or a card without the figure; its errors share no other base
            return None
