"""What computing in bfloat16 changes: gradients and log-probabilities against float32.

Run by `make bench-precision`. One step of TRACE on rollouts of SmolLM2, or of the policy named by
--model, with one set of sequences for all recipes:

float32          the reference: one rank, nothing is sharded
bfloat16, n      the trainer's recipe on n ranks: float32 weights, cast for the passes; gradients
                 summed in float32
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from step_case import sampled_case, unsampled_case

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import RoutingConfig, TrainConfig
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_policy, load_tokenizer
from trace_opd.trace.ranks import join_ranks, whole_tensor
from trace_opd.trace.sequences import training_sequences
from trace_opd.trace.trained import Trained
from trace_opd.trace.trainer import Trainer

_SCORED = 4  # responses whose log-probabilities are compared


def measure(model: str, table: Path, recipe: str, out: Path) -> None:
    """Save the gradient of one step by parameter name, and log-probabilities of some responses."""
    ranks = join_ranks("cpu")
    low = recipe == "bfloat16"
    config = TrainConfig.model_validate(
        {"offline": {"steps": 1}, "micro_batch_tokens": 2048, "policy": {"device": "cpu"}}
    )
    policy = load_policy(
        resolve_policy(model), "cpu", "bfloat16" if low else "float32", trainable=True, ranks=ranks
    )
    trainer = Trainer(policy, config, ranks)
    sequences = training_sequences(pq.read_table(table), policy.tokenizer, config.prompt)
    trainer.accumulate_gradients(sequences, kl=0.5)
    rows = [[*one.prompt_ids, *one.token_ids.tolist()] for one in sequences[:_SCORED]]
    logprobs = np.concatenate(Trained(policy, trainer.student).logprobs(rows))
    tensors = {
        name: whole_tensor(p.grad).contiguous() for name, p in trainer.student.named_parameters()
    }
    if ranks.first:
        save_file(tensors | {"logprobs": torch.from_numpy(logprobs)}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--measure", nargs=3, metavar=("TABLE", "RECIPE", "OUT"))
    args = parser.parse_args()
    if args.measure:
        table, recipe, out = args.measure
        measure(args.model, Path(table), recipe, Path(out))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "routed.parquet")
        pq.write_table(_routed(args.model, args.groups, args.new_tokens), table)
        found = {
            name: _result(args.model, table, recipe, ranks, Path(folder, f"{index}.safetensors"))
            for index, (name, recipe, ranks) in enumerate(
                [
                    ("float32", "float32", 1),
                    ("bfloat16, 1 rank", "bfloat16", 1),
                    ("bfloat16, 2 ranks", "bfloat16", 2),
                ]
            )
        }
    Console().print(_table(found, f"{args.model} on the CPU, {platform.processor()}"))


def _routed(model: str, groups: int, new_tokens: int) -> pa.Table:
    routing = RoutingConfig(key="fkl", error="rkl")
    with tempfile.TemporaryDirectory() as folder:
        case = sampled_case(unsampled_case(model, "cpu", groups, 4, new_tokens, routing, folder))
        table = byte_table(load_tokenizer(case.path))
    return case.routed(case.rollouts, table, with_teacher=True)


def _result(model: str, table: Path, recipe: str, ranks: int, out: Path) -> dict[str, torch.Tensor]:
    own = [__file__, "--model", model, "--measure", str(table), recipe, str(out)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    command = [sys.executable, *(launcher if ranks > 1 else []), *own]
    subprocess.run(command, check=True, env=os.environ | threads)
    return load_file(out)


def _table(found: dict[str, dict[str, torch.Tensor]], title: str) -> Table:
    table = Table(
        "recipe", "gradient norm", "error of the gradient", "error of log-probabilities, nats",
        title=title,
    )  # fmt: skip
    exact = found["float32"]
    names = [name for name in exact if name != "logprobs"]
    whole = _joined(exact, names)
    for recipe, result in found.items():
        gradient = _joined(result, names)
        drift = (result["logprobs"] - exact["logprobs"]).abs().mean()
        error = (gradient - whole).norm() / whole.norm()
        table.add_row(recipe, f"{gradient.norm():.4f}", f"{error:.2%}", f"{drift:.4f}")
    return table


def _joined(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


if __name__ == "__main__":
    main()
