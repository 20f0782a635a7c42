"""Generated tokens per second: our samplers, and the engines below them without our code.

    make bench-rollout

One model, the same prompts, one group per prompt, temperature 1, log-probabilities of the sampled
tokens; float32 on CPU, bfloat16 on CUDA. The rows:

- transformers: our sampler over transformers; transformers_continuous_batching: its own
  continuous batching.
- vllm: ours over an engine in its own process; vllm_bare: `vllm.LLM.generate` on the same engine,
  token ids in and out.
- vllm_options: vllm_bare, vllm_without_seeds (no request has a seed of its own), and
  vllm_logprob_objects (an object a log-probability, not flat lists).
- vllm_in_process: ours over an engine in the trainer's process.
- vllm_server: our client of a `vllm serve`.

Each implementation is a process. The two of one bullet take turns, so that drift of the machine
affects both; the bullets run one after another to save memory. Seconds are the
median of the repetitions after a warm-up with the same prompts. Every call to vLLM's engine starts
with an empty prefix cache, as it must after a change of weights.

Sampling's share of a training step is computed from one optimiser step (GRPO) on rollouts of the
same prompts, also in its own process. Implementations that are not installed are skipped. Rows of
another device are kept in benchmarks/results/rollout.json.
"""

import argparse
import multiprocessing
import statistics
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import processor, stamp
from results import append, write_rows
from rich.console import Console
from rich.table import Table
from rollout_works import (
    Asked,
    Work,
    continuous_batching,
    serving,
    training,
    transformers_ours,
    vllm_engine,
)
from shapes import NAMES
from step_case import Case, sampled_case, unsampled_case

from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.schemas.configs import OpenAISampler, RoutingConfig

# The implementations of a line are measured in turns.
TOGETHER = (
    ("transformers", "transformers_continuous_batching"),
    ("vllm",),  # measures vllm_bare too
    ("vllm_options",),
    ("vllm_in_process",),
    ("vllm_server",),
    ("training",),
)
IMPLEMENTATIONS = [name for names in TOGETHER for name in names]


def process_of(name: str, case: Case, pipe: Connection) -> None:
    """Send the available works' names, then run one of them per message."""

    def serve(works: dict[str, Work]) -> None:
        pipe.send(list(works))
        while True:
            which, turn = pipe.recv()
            if which is None:
                return
            began = time.perf_counter()
            tokens = works[which](turn)
            if case.device == "cuda":
                torch.cuda.synchronize()
            pipe.send((tokens, time.perf_counter() - began))

    match name:
        case "transformers":
            serve(transformers_ours(case))
        case "transformers_continuous_batching":
            serve(continuous_batching(case))
        case "vllm" | "vllm_in_process" | "vllm_options":
            with vllm_engine(case, name) as works:
                serve(works)
        case "vllm_server":
            with serving(case) as url:
                config = OpenAISampler(engine="openai", base_url=url, concurrency=256)
                serve({name: Asked(case).by(OpenAIPolicySampler(config, case.path))})
        case "training":
            serve(training(case))


def measure(
    names: list[str], case: Case, repetitions: int, console: Console
) -> dict[str, list[tuple[int, float]]]:
    """(tokens, seconds) of each repetition by work."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=process_of, args=(name, case, theirs)))
        processes[-1].start()
        theirs.close()
        with console.status(f"{name}: starting"):
            pipes |= dict.fromkeys(mine.recv(), mine)
    samples: dict[str, list[tuple[int, float]]] = {work: [] for work in pipes}
    for turn in range(repetitions + 1):
        for work, pipe in pipes.items():
            with console.status(f"{work}: {turn or 'warm-up'}"):
                pipe.send((work, turn))
                if turn:
                    samples[work].append(pipe.recv())
                else:
                    pipe.recv()
    for pipe in set(pipes.values()):
        pipe.send((None, 0))
    for process in processes:
        process.join()
    return samples


def rows_of(
    samples: dict[str, list[tuple[int, float]]], case: Case, shape: str
) -> list[dict[str, Any]]:
    """rollout.json: one row per implementation.

    overhead_vs_bare: the additional seconds per token as a share of vllm_bare's. share_of_step:
    sampling's share of sampling plus one optimiser step.
    """

    def per_token(work: str) -> float:
        return statistics.median(seconds / tokens for tokens, seconds in samples[work])

    rows = []
    for work in samples:
        if work == "training":
            continue
        row = {
            "implementation": work,
            "prompts": len(case.problems),
            "group_size": case.group_size,
            "tokens": round(statistics.mean(tokens for tokens, _ in samples[work])),
            "tokens_per_second": round(1 / per_token(work), 2),
            "overhead_vs_bare": None,
            "share_of_step": None,
            "shape": shape,
            "device": case.device,
        }
        if "vllm_bare" in samples and work.startswith("vllm"):
            row["overhead_vs_bare"] = round(per_token(work) / per_token("vllm_bare") - 1, 4)
        if "training" in samples:
            step = per_token("training")
            row["share_of_step"] = round(per_token(work) / (per_token(work) + step), 3)
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("tokens", "tokens/s", "over bare vLLM", "share of a step"):
        table.add_column(column, justify="right")
    for row in rows:
        over, share = row["overhead_vs_bare"], row["share_of_step"]
        table.add_row(
            row["implementation"],
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:.1f}",
            "–" if over is None else f"{over:+.1%}",
            "–" if share is None else f"{share:.0%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Generated tokens per second.")
    parser.add_argument("--shape", default="smollm2", help=f"a config.json, or {', '.join(NAMES)}")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="subset")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--models", help="folder of random models; each is written once")
    parser.add_argument("--log", type=Path, help="add the rows to this file instead")
    options = parser.parse_args()
    names = options.implementations.split(",")
    if unknown := set(names) - set(IMPLEMENTATIONS):
        parser.error(f"no such implementation: {', '.join(sorted(unknown))}")
    console = Console()
    if find_spec("vllm") is None and any(name.startswith("vllm") for name in names):
        names = [name for name in names if not name.startswith("vllm")]
        console.print("Left out: vllm; it is not installed.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (options.groups, options.group_size, options.max_new_tokens)
    rows: list[dict[str, Any]] = []
    samples: dict[str, list[tuple[int, float]]] = {}
    with TemporaryDirectory(prefix="trace-opd-") as folder:
        with console.status("making the batch"):
            case = unsampled_case(
                options.shape, device, *sizes, RoutingConfig(), options.models or folder
            )
            if "training" in names:
                case = sampled_case(case)
        for together in TOGETHER:
            chosen = [name for name in together if name in names]
            samples |= measure(chosen, case, options.repetitions, console)
            rows = rows_of(samples, case, options.shape)
            if not options.log:
                write_rows("rollout.json", rows)  # saved now, because the next step may fail
    if options.log:
        append(options.log, [stamp(device) | {"part": "rollout"} | row for row in rows])
    console.print(table_of(rows, f"{processor(device)}; {options.shape}"))


if __name__ == "__main__":
    main()
