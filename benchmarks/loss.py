"""Time and memory of the loss head, forward and backward: ours, the peers' and a lower bound.

    make bench-loss

A quarter of the tokens is routed. On CPU in float32 at SmolLM2-135M's shape (hidden 576, vocabulary
49,152); with a CUDA device also in bfloat16 at Qwen3-8B's (4,096 and 151,936). loss_peers.py
describes each row. Peers that are not installed are skipped: pip install -e '.[peers]'.

Each row is a process, which first checks its loss and gradients against plain PyTorch. Rows of one
size take turns, so that drift of the machine affects all of them. Seconds are the median of up to
five repetitions: at least three, but only one where the first takes over a minute. Memory is a
repetition's peak beyond the memory before it, gradients included: the resident set's high-water
mark on CPU (Linux), the allocator's on CUDA. Prints a table and writes
benchmarks/results/loss.json, which keeps the rows of devices that are not measured this time. A row
that runs out of memory or differs from plain PyTorch has nulls.
"""

import argparse
import ctypes
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import loss_peers
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TOKENS = (512, 2048, 8192)
SHAPES = {"cpu": (576, 49_152, torch.float32), "cuda": (4096, 151_936, torch.bfloat16)}
# Largest difference from plain PyTorch in float32, as a share of the largest entry.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
REPETITIONS = (3, 5)
ENOUGH_SECONDS = 20.0
LONG_SECONDS = 60.0
MIB = 1 << 20


def kib_of(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(f"{file} has no {field}")


def on_cpu(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and peak of additional memory in MiB."""
    # Memory that malloc kept would hide as much of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = kib_of("/proc/self/status", "VmRSS")
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    return seconds, (kib_of("/proc/self/status", "VmHWM") - before) * 1024 / MIB


def on_cuda(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by device events, and peak of additional memory in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    seconds, peak = start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()  # the other rows' processes share the device
    return seconds, peak / MIB


def row_process(name: str, tokens: int, device: str, pipe: Connection) -> None:
    """Answer each message with (seconds, peak MiB) of one repetition, or the reason for none."""
    hidden, vocab, dtype = SHAPES[device]
    difference = loss_peers.disagreement(name, hidden, vocab, dtype, device)
    if difference > TOLERANCE[dtype]:
        pipe.send(f"differs from plain PyTorch by {difference:.1e} of the greatest entry")
        return
    case = loss_peers.make_case(tokens, hidden, vocab, dtype, device)
    work = partial(loss_peers.run, name, case)
    if device == "cpu":
        # An allocation beyond the machine's memory must fail, not bring the machine down.
        room = kib_of("/proc/meminfo", "MemAvailable") + kib_of("/proc/self/status", "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (room * 1024, room * 1024))
    try:
        if device == "cuda":
            on_cuda(work)  # the first use of a shape compiles its kernels
        pipe.send("ready")
        while pipe.recv():
            case.hidden.grad = case.head.grad = None
            pipe.send(on_cuda(work) if device == "cuda" else on_cpu(work))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        pipe.send("needs more memory than is free")


def measure(names: list[str], tokens: int, device: str, console: Console) -> list[dict[str, Any]]:
    """One row per implementation, measured in turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    notes: dict[str, str] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        arguments = (name, tokens, device, theirs)
        processes.append(context.Process(target=row_process, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()  # so that the death of the process is noticed
        answer = pipes[name].recv()
        if answer != "ready":
            notes[name] = answer
    for round_ in range(REPETITIONS[1]):
        for name in names:
            if name in notes or finished([seconds for seconds, _ in samples[name]]):
                continue
            with console.status(f"{device}, {tokens:,} tokens, round {round_ + 1}: {name}"):
                pipes[name].send(True)
                answer = pipes[name].recv()
            if isinstance(answer, str):
                notes[name] = answer
            else:
                samples[name].append(answer)
    for name in names:
        if name not in notes:
            pipes[name].send(False)
    for process in processes:
        process.join()
    for name, note in notes.items():
        console.print(f"{device}, {tokens:,} tokens, {name}: {note}")
    rows = []
    for name in names:
        seconds, peaks = zip(*samples[name], strict=True) if samples[name] else ((), ())
        rows.append(
            {
                "implementation": name,
                "tokens": tokens,
                "device": device,
                "dtype": str(SHAPES[device][2]).removeprefix("torch."),
                "seconds": statistics.median(seconds) if seconds else None,
                "peak_mib": max(peaks, default=None),
            }
        )
    return rows


def finished(seconds: list[float]) -> bool:
    if not seconds:
        return False
    enough = len(seconds) >= REPETITIONS[0] and sum(seconds) > ENOUGH_SECONDS
    return enough or seconds[0] > LONG_SECONDS


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = next(
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "Model", "CPU part"))
    )
    return f"{model}, {torch.get_num_threads()} threads"


def write_rows(file: str, rows: list[dict[str, Any]]) -> None:
    """Write benchmarks/results/`file`; rows of devices not measured now are kept."""
    target = ROOT / "benchmarks" / "results" / file
    target.parent.mkdir(exist_ok=True)
    before = json.loads(target.read_text()) if target.exists() else []
    measured = {row["device"] for row in rows}
    kept = [row for row in before if row["device"] not in measured]
    every = sorted(rows + kept, key=lambda row: row["device"])
    target.write_text(json.dumps(every, indent=2) + "\n")


def ratio(row: dict[str, Any], rows: list[dict[str, Any]], other: str, field: str) -> str:
    """A row's `field` as a multiple of another implementation's at the same size."""
    same = [r for r in rows if (r["tokens"], r["device"]) == (row["tokens"], row["device"])]
    base = next((r[field] for r in same if r["implementation"] == other), None)
    return f"{row[field] / base:.2f}" if base and row[field] is not None else "–"


def table_of(rows: list[dict[str, Any]], device: str) -> Table:
    hidden, vocab, dtype = SHAPES[device]
    table = Table(title=f"{processor(device)}; hidden {hidden:,}, vocabulary {vocab:,}, {dtype}")
    for column in ("tokens", "", "seconds", "× floor", "× ours", "extra MiB", "× ours"):
        table.add_column(column, justify="right" if column else "left")
    of_device = [row for row in rows if row["device"] == device]
    for row, following in zip(of_device, [*of_device[1:], None], strict=True):
        table.add_row(
            f"{row['tokens']:,}",
            row["implementation"],
            f"{row['seconds']:.3f}" if row["seconds"] is not None else "–",
            ratio(row, rows, "floor", "seconds"),
            ratio(row, rows, "ours", "seconds"),
            f"{row['peak_mib']:,.0f}" if row["peak_mib"] is not None else "–",
            ratio(row, rows, "ours", "peak_mib"),
            end_section=following is not None and following["tokens"] != row["tokens"],
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the loss head.")
    parser.add_argument(
        "--tokens", default=",".join(map(str, TOKENS)), help="subset, e.g. 512,2048"
    )
    parser.add_argument(
        "--implementations", default=",".join(loss_peers.IMPLEMENTATIONS), help="subset, by name"
    )
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", default=",".join(here), help="subset: cpu, cuda")
    options = parser.parse_args()
    devices = options.devices.split(",")
    if absent := set(devices) - set(here):
        parser.error(f"no such device here: {', '.join(sorted(absent))}")
    wanted = options.implementations.split(",")
    unknown = set(wanted) - set(loss_peers.IMPLEMENTATIONS)
    if unknown:
        parser.error(f"no such implementation: {', '.join(sorted(unknown))}")
    console = Console()
    names = [name for name in wanted if name in loss_peers.installed()]
    if left_out := [name for name in wanted if name not in names]:
        console.print(
            f"Left out: {', '.join(left_out)}; pip install -e '.[peers]' adds them.", markup=False
        )
    if not names:
        return
    rows: list[dict[str, Any]] = []
    for device in devices:
        for tokens in map(int, options.tokens.split(",")):
            rows += measure(names, tokens, device, console)
        console.print(table_of(rows, device))
    write_rows("loss.json", rows)


if __name__ == "__main__":
    main()
