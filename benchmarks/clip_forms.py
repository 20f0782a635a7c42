"""The four forms of the pointwise KL clip (METHOD.md, "Objective") on the micro policy.

    make bench-clip

TRACE-FKL with the coverage cap and without it (α = 1 routes every line with a carry), offline on
one routed table per seed, with the KL at full weight throughout. Prints a table of held-out pass
rates and writes benchmarks/results/clip.json.
"""

import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.labels import KlClip
from trace_opd.schemas.settings import load_config, override

ROOT = Path(__file__).parents[1]
STEPS = 20
SEEDS = (0, 1)


def measure(
    store: Store, config: PipelineConfig, form: KlClip, seed: int, alpha: float
) -> dict[str, Any]:
    """Pass rate after training with one form; datasets that the forms share are made once."""

    def run(stage: str, section: Any, *changes: str) -> Any:
        return run_stage(stage, override(section, list(changes)), store)

    problems = run("problems", config.problems, "limit=160", f"seed={seed}")
    held_out = run("problems", config.eval_problems, f"seed={seed + 1000}")
    rollouts = run("rollout", config.rollout, f"problems={problems.ref}", f"seed={seed}")
    verdicts = run("verify", config.verify, f"rollouts={rollouts.ref}")
    annotations = run("annotate", config.annotate, f"verdicts={verdicts.ref}")
    routed = run(
        "convert", config.convert, f"annotations={annotations.ref}", f"routing.alpha={alpha}"
    )
    trained = run(
        "train",
        config.train,
        f"offline.routed={routed.ref}",
        f"offline.steps={STEPS}",
        "online.steps=0",
        f"schedule.hold_steps={STEPS}",
        f"loss.kl_clip={form}",
        f"seed={seed}",
    )
    evaluation = run(
        "evaluate", config.evaluate, f"problems={held_out.ref}", f"trained={trained.ref}", "k=4"
    )
    policies = evaluation.summary["policies"]
    return {
        "kl_clip": str(form),
        "alpha": alpha,
        "seed": seed,
        "steps": STEPS,
        "base_pass_rate": policies["base"]["avg@4"]["value"],
        "pass_rate": policies["trained"]["avg@4"]["value"],
        "ci95": policies["trained"]["avg@4"]["ci95"],
    }


def main() -> None:
    config = load_config(PipelineConfig, ROOT / "configs" / "micro.yaml")
    with TemporaryDirectory() as folder:
        rows = [
            measure(Store(folder), config, form, seed, alpha)
            for alpha in (0.25, 1.0)
            for seed in SEEDS
            for form in KlClip
        ]
    table = Table("α", "clip", "seed", "base", "after", "95 %", title=platform.processor())
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            f"{row['alpha']:.2f}",
            row["kl_clip"],
            str(row["seed"]),
            f"{row['base_pass_rate']:.1%}",
            f"{row['pass_rate']:.1%}",
            f"{low:.1%} – {high:.1%}",
        )
    Console().print(table)
    target = ROOT / "benchmarks" / "results" / "clip.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
