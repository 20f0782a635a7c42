"""Measures how fast this machine multiplies and copies; the training plan calls it."""

import time
from collections.abc import Callable
from typing import Any

import torch


def measured_rates(device: str, bfloat16: bool, seconds: float = 0.3) -> tuple[float, float]:
    """Operations and bytes per second of a repeated square matrix product, and of a copy."""
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    matrix = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def per_second(run: Callable[[], Any], amount: float) -> float:
        run()
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            count += 1
        return count * amount / spent

    return (
        per_second(lambda: matrix @ matrix, 2.0 * size**3),
        per_second(lambda: target.copy_(source), 2.0 * len(source)),
    )
