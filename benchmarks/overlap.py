"""Sampling step k+1 while step k trains: seconds per online step, and how far off-policy it gets.

    make bench-overlap

`trace-opd train` on SmolLM2-135M with a vLLM engine, online steps only. `online.max_staleness` 0
(the engine shares the trainer's process and they alternate) and 1 (the engine has its own process
and both work at once) take turns. Trainer and engine have one thread each, as if each had its own
device. Seconds are the median over the steps after the first two (nothing is sampled ahead of the
first, and both allocate buffers). Needs the environment of `make test-vllm`. Prints a table and
writes benchmarks/results/overlap.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from machine import processor
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2.yaml"
ONE_CORE_EACH = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # no compilation: the engine starts sooner
    "VLLM_NO_USAGE_STATS": "1",
}
# Weights must move with any rewards, so every token follows the teacher, which reads the answer.
TRAIN = [
    "offline.steps=0", "groups_per_step=2", "online.group_size=8", "checkpoint_every=1000",
    "sampler={engine: vllm, kv_cache_gib: 0.25, max_model_len: 1024}",
    "online.sampling={temperature: 1.0, max_new_tokens: 48}",
    "online.routing={rule: all, key: fkl, error: fkl, teacher_context: answer}",
    "schedule={w0: 0.5, decay_steps: null}", "optim.lr=1.0e-5", "policy.precision=float32",
]  # fmt: skip
MEASURED = (
    "seconds", "seconds_sample", "seconds_wait", "staleness", "sampler_drift", "sampler_kl",
    "ratio_clipped",
)  # fmt: skip


def command(store: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-P", "-m", "trace_opd.pipelines.cli", *arguments, "--store", store],
        check=True,
        cwd=ROOT,
        env=os.environ | ONE_CORE_EACH,
        stdout=subprocess.DEVNULL,
    )


def run(store: Path, steps: int, staleness: int, seed: int) -> list[dict[str, Any]]:
    """The metrics of the steps that count."""
    before = set(store.glob("train/*"))
    settings = [f"online.steps={steps}", f"online.max_staleness={staleness}", f"seed={seed}"]
    command(store, "train", str(CONFIG), *TRAIN, *settings)
    (made,) = set(store.glob("train/*")) - before
    lines = (made / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[2:]]


def row_of(staleness: int, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """overlap.json: one row per setting, medians over steps."""
    medians = {
        name: statistics.median(step.get(name) or 0.0 for step in steps) for name in MEASURED
    }
    return {"max_staleness": staleness, "steps": len(steps)} | medians


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("max_staleness")
    for row in rows:
        table.add_column(str(row["max_staleness"]), justify="right")
    for name in MEASURED:
        table.add_row(name, *(f"{row[name]:.3g}" for row in rows))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Online steps with and without overlap.")
    parser.add_argument("--steps", type=int, default=5, help="per run")
    parser.add_argument("--repetitions", type=int, default=1, help="runs of each setting")
    options = parser.parse_args()
    console = Console()
    taken: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        command(store, "problems", str(CONFIG))
        for seed in range(options.repetitions):
            for staleness, steps in taken.items():
                with console.status(f"max_staleness {staleness}, run {seed + 1}"):
                    steps += run(store, options.steps, staleness, seed)
    rows = [row_of(staleness, steps) for staleness, steps in taken.items()]
    console.print(table_of(rows, f"{processor('cpu')}; SmolLM2-135M, one thread each"))
    console.print(f"a step takes {rows[1]['seconds'] / rows[0]['seconds']:.2f} × as long one ahead")
    target = ROOT / "benchmarks" / "results" / "overlap.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
