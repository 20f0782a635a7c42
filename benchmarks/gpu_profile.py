"""A profile of the loss: what the device does in one pass, and how long it waits.

    python benchmarks/gpu_profile.py --shape qwen3-8b --lengths 4x512

By torch.profiler, after warm-up. Launches are the device's kernels, copies and fills; on CPU, where
there are none, PyTorch's operators without those that they call. busy is the share of the time from
the first launch's start to the last one's end in which some launch runs. chunks is the number of
products that make a gradient of hidden states: one for each chunk of tokens.
"""

import argparse
from pathlib import Path

import torch
from machine import cuda_here, stamp
from results import Row, append, console
from shapes import Shape, lengths_of, shape_of
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
Span = tuple[float, float]


def busy_share(spans: list[Span]) -> float:
    """Share of the time from the first start to the last end that spans cover; they may overlap."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    first = min(start for start, _ in spans)
    return covered / (until - first) if until > first else 1.0


def measure(name: str, shape: Shape, lengths: tuple[int, int], device: str) -> Row:
    import loss_case
    import loss_peers
    from torch.autograd import DeviceType

    run = loss_peers.implementation(name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = loss_case.make_case(*lengths, shape.hidden, shape.vocab, dtype, device)
    for _ in range(WARM_UP):
        run(case)
    on_cuda = device == "cuda"
    activity = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    case.hidden.grad = case.head.grad = None
    with profile(activities=activity, record_shapes=True) as recorded:
        run(case)
        if on_cuda:
            torch.cuda.synchronize()
    events = recorded.events() or []
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    launches = [e for e in events if e.device_type == wanted and e.cpu_parent is None]
    spans = [(event.time_range.start, event.time_range.end) for event in launches]
    chunks = sum(
        event.name == "aten::mm"
        and event.device_type == DeviceType.CPU
        and list(event.input_shapes[1]) == [shape.vocab, shape.hidden]
        for event in events
    )
    longest = sorted(launches, key=lambda e: e.time_range.elapsed_us(), reverse=True)[:5]
    return {
        "implementation": name,
        "shape": shape.name,
        "lengths": "x".join(map(str, lengths)),
        "tokens": lengths[0] * lengths[1],
        "device": device,
        "launches": len(launches),
        "chunks": chunks,
        "busy": busy_share(spans),
        "milliseconds": sum(end - start for start, end in spans) / 1000,
        "longest": [f"{e.name[:60]} {e.time_range.elapsed_us() / 1000:.2f} ms" for e in longest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A profile of the loss.")
    parser.add_argument("--shape", default="qwen3-8b" if cuda_here() else "smollm2")
    parser.add_argument("--lengths", default="4x512")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if cuda_here() else "cpu"
    )
    parser.add_argument("--implementations", nargs="+", default=["ours"])
    parser.add_argument("--log", type=Path, help="add the rows to this file")
    options = parser.parse_args()
    for name in options.implementations:
        row = measure(name, shape_of(options.shape), lengths_of(options.lengths), options.device)
        console().print(row, highlight=False)
        if options.log:
            append(options.log, [stamp(options.device) | {"part": "profile"} | row])


if __name__ == "__main__":
    main()
