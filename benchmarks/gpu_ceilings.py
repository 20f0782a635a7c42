"""What a device does at most, by PyTorch: bytes a copy moves, operations of a matrix product.

    python benchmarks/gpu_ceilings.py --device cuda

The copy counts bytes read and written. The product is square, in bfloat16 on CUDA, of random
numbers: zeros cost less power and run faster. Medians of ten after three for warm-up.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import cuda_here, stamp
from results import Row, append, console

COPIED = {"cuda": 4 << 30, "cpu": 64 << 20}  # bytes: many times the cache
SIDE = {"cuda": 8192, "cpu": 1024}
WARM_UP, REPETITIONS = 3, 10


def seconds_of(work: Callable[[], object], device: str) -> float:
    def once() -> float:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(WARM_UP):
        once()
    return statistics.median(once() for _ in range(REPETITIONS))


def measure(device: str) -> Row:
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED[device] / seconds_of(partial(target.copy_, source), device)
    side, dtype = SIDE[device], torch.bfloat16 if device == "cuda" else torch.float32
    one, other = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(one)
    product = 2 * side**3 / seconds_of(lambda: torch.mm(one, other, out=out), device)
    return {"copy_bytes_per_second": copied, "product_flops": product, "dtype": str(dtype)[6:]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Ceilings of copies and products.")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if cuda_here() else "cpu"
    )
    parser.add_argument("--log", type=Path, help="add the row to this file")
    options = parser.parse_args()
    row = measure(options.device)
    console().print(
        f"copy {row['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"product {row['product_flops'] / 1e12:.1f} TFLOP/s in {row['dtype']}",
        highlight=False,
    )
    if options.log:
        append(options.log, [stamp(options.device) | {"part": "ceilings"} | row])


if __name__ == "__main__":
    main()
