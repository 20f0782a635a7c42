"""Seconds and memory of one optimiser step: our GRPO, TRACE and TRL's GRPOTrainer.

    make bench-step

One model, the same rollouts, AdamW, float32 on CPU (on CUDA float32 weights under bfloat16
autocast). TRACE runs with λ at full weight and α = 25 % of every response routed, FKL in correct
responses and RKL in wrong ones; `--error none` leaves wrong responses to GRPO (TRACE-FKL). Measured
without generation, on rollouts made in advance, and with it, by each trainer's own sampler over
transformers; those rollouts differ, so the table has their tokens. TRL is skipped if it is not
installed: pip install 'trace-opd[peers]'.

Each implementation is a process, and they take turns, so that drift of the machine affects all. A
warm-up on shortened responses runs first; our GRPO and TRL's must have the same gradient norm in
it. Both cut the batch into micro-batches of about as many tokens. Seconds are the median of the
repetitions. Memory is their maximum: a step's peak beyond what the process holds before it
(weights, optimiser states, the teacher's weights: `resident_mib`), from the resident set's
high-water mark on CPU (Linux), the allocator's on CUDA. Prints a table and the time of the
teacher's forward passes alone, and writes benchmarks/results/step.json, which keeps the rows of
other devices.
"""

import argparse
import math
import multiprocessing
import statistics
from importlib.util import find_spec
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from loss import processor, write_rows
from rich.console import Console
from rich.table import Table
from step_case import (
    BETA1,
    BETA2,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MODELS,
    Case,
    Measured,
    Mode,
    Turns,
    make_case,
)

from trace_opd.schemas.configs import (
    LossConfig,
    OfflineConfig,
    OptimConfig,
    RoutingConfig,
    ScheduleConfig,
    TrainConfig,
)
from trace_opd.schemas.labels import Route
from trace_opd.trace.align import byte_table
from trace_opd.trace.losses import Head
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.sequences import (
    TrainingSequence,
    micro_batches,
    teacher_row,
    training_sequences,
)
from trace_opd.trace.trainer import Trainer

IMPLEMENTATIONS = ("ours_grpo", "ours_trace", "trl_grpo")
# Largest relative difference between the gradient norms of our GRPO and TRL's.
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
HEAD_ROWS = 512  # rows of logits at once in the teacher's forward passes


def ours(case: Case, turns: Turns, micro_batch_tokens: int, with_teacher: bool) -> None:
    """Take turns until the process is terminated."""
    policy = case.policy()
    config = TrainConfig(
        prompt=case.prompt,
        offline=OfflineConfig(steps=1),
        schedule=ScheduleConfig(w0=0.5 if with_teacher else 0.0, decay_steps=None),
        loss=LossConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        optim=OptimConfig(lr=LEARNING_RATE, beta1=BETA1, beta2=BETA2, max_grad_norm=MAX_GRAD_NORM),
        micro_batch_tokens=micro_batch_tokens,
    )
    trainer = Trainer(policy, config)
    table = byte_table(policy.tokenizer)
    for seed in count(1):
        mode = turns.next()
        rollouts = case.shortened(table) if mode == "warm-up" else case.rollouts
        routed = case.routed(rollouts, table, with_teacher)
        turns.begin()
        if mode == "generation":
            routed = case.routed(case.sample(policy, seed), table, with_teacher)
        sequences = training_sequences(routed, policy.tokenizer, case.prompt, with_teacher)
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
        if mode == "teacher":
            assert trainer.teacher is not None
            teacher_alone(trainer.teacher, sequences, micro_batch_tokens)
            turns.end(tokens)
        else:
            turns.end(tokens, trainer.train_step(sequences)["grad_norm"])


@torch.no_grad()
def teacher_alone(
    teacher: PackedModel, sequences: list[TrainingSequence], micro_batch_tokens: int
) -> None:
    """The minimum of every TRACE step: the backbone up to each last routed token, the head at
    routed tokens.
    """

    def logits(states: torch.Tensor, head: Head) -> None:
        for piece in states.split(HEAD_ROWS):
            torch.nn.functional.linear(piece, head.weight.to(piece.dtype), head.bias)

    for rows in micro_batches(sequences, micro_batch_tokens):
        if (row := teacher_row(rows)) is not None:
            teacher(row, logits)


def step_process(name: str, case: Case, options: argparse.Namespace, pipe: Connection) -> None:
    turns = Turns(pipe, case.device)
    if name == "trl_grpo":
        from step_trl import trl_grpo

        trl_grpo(case, turns, options.trl_micro_batches)
    else:
        ours(case, turns, options.micro_batch_tokens, with_teacher=name == "ours_trace")


def measure(
    names: list[str], case: Case, options: argparse.Namespace, console: Console
) -> dict[tuple[str, Mode], list[Measured]]:
    """Repetitions by implementation and mode, measured in turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        arguments = (name, case, options, theirs)
        processes.append(context.Process(target=step_process, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()

    def turn(name: str, mode: Mode) -> Measured:
        with console.status(f"{name}: {mode}"):
            pipes[name].send(mode)
            try:
                return pipes[name].recv()
            except EOFError:
                raise SystemExit(f"{name} ended early; its error is above") from None

    samples: dict[tuple[str, Mode], list[Measured]] = {}
    norms = {name: turn(name, "warm-up").grad_norm for name in names}
    if {"ours_grpo", "trl_grpo"} <= norms.keys():
        own, peers = norms["ours_grpo"], norms["trl_grpo"]
        if not math.isclose(own, peers, rel_tol=TOLERANCE[case.device]):
            raise SystemExit(f"gradient norms differ: ours_grpo {own}, trl_grpo {peers}")
    for _ in range(options.repetitions):
        for mode in ("training", "generation"):
            for name in names:
                samples.setdefault((name, mode), []).append(turn(name, mode))
        if "ours_trace" in names:
            samples.setdefault(("ours_trace", "teacher"), []).append(turn("ours_trace", "teacher"))
    for process in processes:
        process.terminate()
    return samples


def seconds_of(measured: list[Measured]) -> float:
    return statistics.median(one.seconds for one in measured)


def rows_of(
    samples: dict[tuple[str, Mode], list[Measured]], options: argparse.Namespace, device: str
) -> list[dict[str, Any]]:
    """step.json: one row per implementation, without generation and with it; TRACE's first row has
    the teacher's forward passes alone as `teacher_seconds`.
    """
    rows = []
    for (name, mode), measured in samples.items():
        if mode == "teacher":
            continue
        row = {
            "implementation": name,
            "with_generation": mode == "generation",
            "seconds": seconds_of(measured),
            "peak_mib": round(max(one.peak_mib for one in measured), 1),
            "resident_mib": round(max(one.resident_mib for one in measured), 1),
            "tokens": round(statistics.mean(one.tokens for one in measured)),
            "model": options.model,
            "device": device,
            "dtype": "bfloat16" if device == "cuda" else "float32",
        }
        if (name, mode) == ("ours_trace", "training"):
            row["teacher_seconds"] = seconds_of(samples[name, "teacher"])
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("generation", ""):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "seconds", "× TRL", "extra MiB", "× TRL"):
        table.add_column(column, justify="right")
    peers = {row["with_generation"]: row for row in rows if row["implementation"] == "trl_grpo"}
    for row in sorted(rows, key=lambda row: row["with_generation"]):
        peer = peers.get(row["with_generation"])
        table.add_row(
            "included" if row["with_generation"] else "excluded",
            row["implementation"],
            f"{row['tokens']:,}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / peer['seconds']:.2f}" if peer else "–",
            f"{row['peak_mib']:,.0f}",
            f"{row['peak_mib'] / peer['peak_mib']:.2f}" if peer else "–",
        )
    return table


def batch_of(case: Case) -> str:
    """A sentence about the batch."""
    lengths = np.array([len(ids) for ids in case.rollouts["token_ids"].to_pylist()])
    prompts = [len(ids) for ids in case.rollouts["prompt_token_ids"].to_pylist()]
    routed = case.routed(case.rollouts, byte_table(load_tokenizer(case.path)), True)
    share = np.mean([any(route) for route in routed["route"].to_pylist()])
    coverage = sum(sum(map(bool, route)) for route in routed["route"].to_pylist()) / lengths.sum()
    return (
        f"{len(case.problems)} groups of {case.group_size} responses, {lengths.min()} to "
        f"{lengths.max()} tokens, {lengths.mean():.0f} in the mean, behind prompts of "
        f"{min(prompts)} to {max(prompts)}; {share:.0%} of the responses have routed tokens, which "
        f"are {coverage:.0%} of all"
    )


def teachers_share(samples: dict[tuple[str, Mode], list[Measured]]) -> str:
    grpo = seconds_of(samples["ours_grpo", "training"])
    trace = seconds_of(samples["ours_trace", "training"])
    alone = seconds_of(samples["ours_trace", "teacher"])
    bound = 1 + alone / grpo
    return (
        f"TRACE takes {trace / grpo:.2f} × our GRPO's time. The teacher's forward passes alone are "
        f"{alone / grpo:.2f} of it, so {bound:.2f} × is the bound, which TRACE exceeds by "
        f"{trace / grpo / bound - 1:.0%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one optimiser step.")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="subset")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--error", choices=["rkl", "fkl", "none"], default="rkl")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=384, help="of ours")
    # On CPU the number of micro-batches hardly changes TRL's time; its memory grows with their
    # size.
    parser.add_argument("--trl-micro-batches", type=int, default=8, help="per step")
    options = parser.parse_args()
    names = options.implementations.split(",")
    if unknown := set(names) - set(IMPLEMENTATIONS):
        parser.error(f"no such implementation: {', '.join(sorted(unknown))}")
    console = Console()
    if "trl_grpo" in names and find_spec("trl") is None:
        names.remove("trl_grpo")
        console.print("Left out: trl_grpo; pip install 'trace-opd[peers]' adds it.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    routing = RoutingConfig(alpha=0.25, key=Route.FKL, error=options.error)
    with console.status("sampling the batch"):
        case = make_case(
            options.model,
            device,
            options.groups,
            options.group_size,
            options.max_new_tokens,
            routing,
        )
    samples = measure(names, case, options, console)
    rows = rows_of(samples, options, device)
    console.print(batch_of(case))
    console.print(table_of(rows, f"{processor(device)}; {options.model}"))
    if {"ours_grpo", "ours_trace"} <= set(names):
        console.print(teachers_share(samples))
    write_rows("step.json", rows)


if __name__ == "__main__":
    main()
