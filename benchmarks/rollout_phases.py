"""Seconds of what a vLLM engine in the trainer's process does at each step.

    python benchmarks/rollout_phases.py --shape smollm2

wake, hand_over (all weights, by tensors), probe, sample, sleep: medians over the rounds after the
first, with the phases that training has in metrics.jsonl. Weights change before each hand-over. On
the CPU an engine does not sleep, so wake and sleep are missing. Prints a table and writes
benchmarks/results/rollout_phases.json; rows of another device are kept.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import processor, stamp
from results import append, write_rows
from rich.console import Console
from rich.table import Table
from rollout_works import Asked, engine_config
from shapes import NAMES
from step_case import unsampled_case

from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.schemas.configs import RoutingConfig
from trace_opd.trace.clock import PhaseClock
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trained import Trained

_CHANGE = 1.001  # of all weights at a time: the probe shows whether the engine followed


def main() -> None:
    parser = argparse.ArgumentParser(description="Phases of a vLLM engine in training.")
    parser.add_argument("--shape", default="smollm2", help=f"a config.json, or {', '.join(NAMES)}")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", help="folder of random models; each is written once")
    parser.add_argument("--log", type=Path, help="add the row to this file instead")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="trace-opd-") as folder:
        measure(options, options.models or folder)


def measure(options: argparse.Namespace, folder: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (options.groups, options.group_size, options.max_new_tokens)
    case = unsampled_case(options.shape, device, *sizes, RoutingConfig(), folder)
    policy = load_policy(case.path)
    policy.model.requires_grad_(False)
    trained, asked = Trained(policy, PackedModel(policy.model)), Asked(case)
    sampler = VllmPolicySampler(engine_config(case), case.path, in_process=True, sleeps=True)
    texts = case.problems["problem"].to_pylist()[:2]
    probe = Probe(policy.tokenizer, case.prompt, texts)
    rounds: list[dict[str, float]] = []
    for turn in range(options.rounds):
        sampler.rest()  # as at the end of the step before
        clock = PhaseClock(device=policy.device)
        for parameter in policy.model.parameters():
            parameter.mul_(_CHANGE)
        clock("probe")
        probe.ask(trained)
        sampler.follow(trained, probe, clock)
        clock("sample")
        asked.by(sampler)(turn)
        sampler.rest(clock)
        rounds.append(clock.metrics())
    sampler.close()
    medians = {
        name: round(statistics.median(one[name] for one in rounds[1:]), 4) for name in rounds[-1]
    }
    row = {
        "shape": options.shape,
        "device": device,
        "responses": options.groups * options.group_size,
    }
    if options.log:
        append(options.log, [stamp(device) | {"part": "phases"} | row | medians])
    else:
        write_rows("rollout_phases.json", [row | medians])
    table = Table("", "", title=f"{processor(device)}; {options.shape}")
    for name, value in medians.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
