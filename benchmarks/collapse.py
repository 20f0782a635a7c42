"""What the watch on collapse (trace/collapse.py) says of the micro study's methods.

    make bench-collapse

Trains arms of studies/micro.yaml again, each at the learning rate that the study chose for it, and
some also at a rate that breaks them. Prints the warnings of each run, and writes the watched
figures of every step to benchmarks/results/collapse.json, over which tests/trace/test_collapse.py
runs the watch.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
from results import RESULTS, console
from rich.table import Table

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.run_metrics import METRICS, read_metrics
from trace_opd.pipelines.study.arms import Run, arms
from trace_opd.pipelines.study.problem_sets import ProblemSets, problem_sets
from trace_opd.pipelines.study.runs import open_pool, train_all
from trace_opd.pipelines.training.validation import base_scores
from trace_opd.schemas.configs import StudyConfig
from trace_opd.schemas.settings import load_config
from trace_opd.trace.collapse import WATCHED, CollapseWatch

ROOT = Path(__file__).parents[1]
FILE = RESULTS / "collapse.json"
SEEDS = (0, 1)
MAIN = "validation_test_sampled"
ARMS = {
    "methods": ("grpo", "trace-fkl", "trace-rkl", "trace-both", "srpo", "rlsd", "all-token-rkl",
                "all-token-fkl", "sdpo"),
    "clip": ("all-token entry_above",),
}  # fmt: skip
# At rates far beyond the study's, methods fail in other ways: longer loops, shorter responses.
BROKEN = {"sdpo": "1.0e-3", "all-token-rkl": "2.0e-3", "all-token entry_above": "1.0e-3"}


def runs_of(config: StudyConfig, sets: dict[int | None, ProblemSets]) -> list[Run]:
    """The arms with their seeds and the choices that the recorded study made."""
    recorded = pl.read_parquet(ROOT / "studies" / "micro" / "results.parquet")
    runs = []
    for arm in arms(config, sets=sets):
        if arm.name in ARMS.get(arm.ablation, ()):
            of_arm = (pl.col("ablation") == arm.ablation) & (pl.col("method") == arm.name)
            choice = recorded.filter(of_arm)["choice"][0]
            runs += [Run(arm, seed, tuple(choice.split())) for seed in SEEDS]
            if arm.name in BROKEN:
                runs.append(Run(arm, SEEDS[0], (f"optim.lr={BROKEN[arm.name]}",)))
    return runs


def record(run: Run, dataset: Dataset) -> dict[str, Any]:
    """A run's watched figures: those of the base, and a line per step."""
    lines = read_metrics(dataset.local_path(METRICS))
    kept = [
        {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in line.items()
            if name in ("step", "pass_rate_se", *WATCHED) or name.startswith("validation_")
        }
        for line in lines
    ]
    return {
        "ablation": run.arm.ablation,
        "method": run.arm.name,
        "seed": run.seed,
        "choice": " ".join(run.choice),
        "base": base_scores(Path(dataset.path())),
        "steps": kept,
    }


def main() -> None:
    config = load_config(StudyConfig, ROOT / "studies" / "micro.yaml")
    main_split = next(iter(config.splits))
    config = config.model_copy(
        update={"splits": {main_split: config.splits[main_split]}, "tuning": None}
    )
    with TemporaryDirectory() as folder:
        store = Store(folder)
        runs = runs_of(config, problem_sets(config, store, [None]))
        with open_pool(config.workers) as pool:
            made = train_all(runs, store, pool, "collapse", config.name)
        rows = [record(run, dataset) for run, dataset in zip(runs, made, strict=True)]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    table = Table("method", "choice", "seed", "warnings", "test, base", "test, last")
    for row in rows:
        watch = CollapseWatch(config.train.collapse, row["base"])
        alarms = [alarm for line in row["steps"] for alarm in watch.observe(line)]
        found = "\n".join(f"step {alarm.step}: {alarm}" for alarm in alarms) or "–"
        rates = row["base"][MAIN][0], row["steps"][-1][MAIN]
        cells = [row["method"], row["choice"], str(row["seed"]), found]
        table.add_row(*cells, *(f"{rate:.1%}" for rate in rates))
    console().print(table)


if __name__ == "__main__":
    main()
