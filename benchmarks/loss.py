"""Time and memory of the loss head, forward and backward: ours, the peers' and a lower bound.

    make bench-loss
    python benchmarks/loss.py --shape qwen3-8b --lengths 1x512,4x512 --implementations floor,ours

A quarter of the tokens is routed; states and heads are random numbers of the shape's sizes
(shapes.py), float32 on CPU, bfloat16 on CUDA. loss_peers.py describes each row. Peers that are not
installed are left out: pip install -e '.[peers]'.

Each row is a process, which first checks its loss and gradients against plain PyTorch. On CPU rows
of one size take turns, so that drift of the machine affects all of them. Seconds are the median of
up to five repetitions: at least three, but only one where the first takes over a minute. On CUDA
one row follows another, so that each has the memory to itself; seconds are the median of twenty
after three for warm-up. Memory is a repetition's peak beyond the memory before it, gradients
included: the resident set's high-water mark on CPU (Linux), the allocator's on CUDA.

Prints a table and writes benchmarks/results/loss.json, which keeps the rows of other devices and
shapes. A row that runs out of memory, fails or differs from plain PyTorch has nulls and a note.
"""

import argparse
import statistics
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from machine import cuda_here, processor, stamp
from results import Row, append, console, number, ratio, write_rows
from rich.console import Console
from rich.table import Table
from shapes import NAMES, Shape, lengths_of, shape_of
from turns import Ended, Workers

LENGTHS = "1x512,4x512,16x512"
NAMED = ("floor", "ours", "naive", "trl_span", "trl_all", "liger")
ON_CUDA = ("ours:backend=torch", "ours:fp32_logits=true")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Largest difference from plain PyTorch in float32, as a share of the largest entry.
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}
REPETITIONS = {"cpu": (3, 5), "cuda": (20, 20)}
PRELOADED = ["trace_opd.trace.fused"]
WARM_UP = {"cpu": 0, "cuda": 3}
ENOUGH_SECONDS = 20.0
LONG_SECONDS = 60.0


class Differs(Exception):
    """An implementation computes another loss, or other gradients, than plain PyTorch."""


def row_process(
    name: str, shape: Shape, sizes: list[tuple[int, int]], device: str, pipe: Connection
) -> None:
    """Answer each index of a size with (seconds, peak MiB) of one repetition."""
    import loss_case
    import loss_peers
    import torch
    from meter import Meter, limit_to_free_memory

    run = loss_peers.implementation(name)
    numbers = shape.hidden, shape.vocab, getattr(torch, DTYPES[device]), device
    if name != "floor":  # which has no loss
        short = loss_case.make_case(2, loss_case.CHECKED_TOKENS, *numbers, name == "trl_all")
        difference = loss_case.disagreement(run, loss_peers.naive, short)
        if not difference <= TOLERANCE[device]:
            raise Differs(f"from plain PyTorch, by {difference:.1e} of the greatest entry")
        del short
    pipe.send("ready")
    meter, made, case = Meter(device), None, None
    while True:
        index = pipe.recv()
        if index != made:
            case = None  # before the next one is made
            made, case = index, loss_case.make_case(*sizes[index], *numbers)
            if device == "cpu":
                limit_to_free_memory()
            for _ in range(WARM_UP[device]):
                run(case)
        assert case is not None
        case.hidden.grad = case.head.grad = None
        meter.begin()
        run(case)
        pipe.send(meter.end())


def measure(
    names: list[str], shape: Shape, sizes: list[tuple[int, int]], device: str, out: Console
) -> Iterator[list[Row]]:
    """The rows of one size, or on CUDA those of one implementation, as soon as they are known."""
    for group in [[name] for name in names] if device == "cuda" else [names]:
        notes: dict[str, str] = {}
        with Workers(device, PRELOADED) as workers:
            for name in group:
                workers.start(name, row_process, name, shape, sizes, device)
                try:
                    workers.receive(name)
                except Ended as reason:
                    notes[name] = str(reason)
            for index, lengths in enumerate(sizes):
                samples: dict[str, list[tuple[float, float]]] = {name: [] for name in group}
                for round_ in range(REPETITIONS[device][1]):
                    for name in group:
                        if name in notes or finished([s for s, _ in samples[name]], device):
                            continue
                        with out.status(f"{device}, {lengths}, round {round_ + 1}: {name}"):
                            try:
                                samples[name].append(workers.ask(name, index))
                            except Ended as reason:  # for the sizes behind it too
                                notes[name] = str(reason)
                yield [_row(n, shape, lengths, device, samples[n], notes.get(n)) for n in group]


def _row(
    name: str,
    shape: Shape,
    lengths: tuple[int, int],
    device: str,
    samples: list[tuple[float, float]],
    note: str | None,
) -> Row:
    seconds, peaks = zip(*samples, strict=True) if samples and not note else ((), ())
    row: Row = {
        "implementation": name,
        "shape": shape.name,
        "lengths": "x".join(map(str, lengths)),
        "tokens": lengths[0] * lengths[1],
        "device": device,
        "dtype": DTYPES[device],
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_mib": max(peaks, default=None),
    }
    return row | ({"note": note} if note else {})


def finished(seconds: list[float], device: str) -> bool:
    if not seconds:
        return False
    enough = len(seconds) >= REPETITIONS[device][0] and sum(seconds) > ENOUGH_SECONDS
    return enough or seconds[0] > LONG_SECONDS


def table_of(rows: list[Row], shape: Shape, device: str) -> Table:
    sizes = f"hidden {shape.hidden:,}, vocabulary {shape.vocab:,}, {DTYPES[device]}"
    table = Table(title=f"{processor(device)}; {shape.name}: {sizes}")
    for column in ("tokens", "", "milliseconds", "× floor", "× ours", "extra MiB", "× ours"):
        table.add_column(column, justify="right" if column else "left")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        same = {r["implementation"]: r for r in rows if r["lengths"] == row["lengths"]}
        floor, ours = same.get("floor", {}), same.get("ours", {})
        seconds, peak = row["seconds"], row["peak_mib"]
        table.add_row(
            f"{row['tokens']:,}",
            row["implementation"],
            number(seconds and 1000 * seconds, ",.1f"),
            ratio(seconds, floor.get("seconds")),
            ratio(seconds, ours.get("seconds")),
            number(peak),
            ratio(peak, ours.get("peak_mib")),
            end_section=following is not None and following["lengths"] != row["lengths"],
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the loss head.")
    on_cuda = cuda_here()
    parser.add_argument(
        "--shape", help=f"a config.json, or {', '.join(NAMES)}; smollm2, on CUDA qwen3-8b"
    )
    parser.add_argument("--lengths", default=LENGTHS, help="responses x tokens of each, a list")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_cuda else "cpu")
    parser.add_argument(
        "--implementations",
        nargs="+",
        help=f"{', '.join(NAMED)}, or ours with overrides of its config: {ON_CUDA[0]}",
    )
    parser.add_argument("--log", type=Path, help="add the rows to this file instead")
    options = parser.parse_args()
    device = options.device
    try:
        shape = shape_of(options.shape or ("qwen3-8b" if device == "cuda" else "smollm2"))
        sizes = [lengths_of(text) for text in options.lengths.split(",")]
    except ValueError as error:
        parser.error(str(error))
    names = options.implementations or [*NAMED, *(ON_CUDA if device == "cuda" else ())]
    if unknown := [n for n in names if n.partition(":")[0] not in NAMED]:
        parser.error(f"no such implementation: {', '.join(unknown)}")
    out, rows = console(), []
    for measured in measure(names, shape, sizes, device, out):
        for row in measured:
            if "note" in row:
                out.print(f"{row['implementation']}: {row['note']}", markup=False)
        if options.log:
            append(options.log, [stamp(device) | {"part": "loss"} | row for row in measured])
        rows += measured
    order = {f"{count}x{tokens}": index for index, (count, tokens) in enumerate(sizes)}
    rows.sort(key=lambda row: order[row["lengths"]])
    out.print(table_of(rows, shape, device))
    if not options.log:
        write_rows("loss.json", rows, same=("device", "shape"))


if __name__ == "__main__":
    main()
