"""The main job, start to end: python -m trace_opd.pipelines.bundled.demo [micro|smollm2]

Runs the pipeline of configs/<model>.yaml as Prefect flows on the embedded server, then sums up:
pass rate before and after with 95 % intervals, the Parquet paths, the report, summary.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from ...data.store import Store
from ...schemas.configs import PipelineConfig
from ...schemas.settings import load_config
from ..models import resolve_policy
from ..terminal import Terminal

_ROOT = Path(__file__).parents[2]
_TABLES = ("problems", "rollouts", "verdicts", "annotations", "routed")
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("model", nargs="?", default="micro", choices=("micro", "smollm2"))
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
    args = parser.parse_args()
    config_path = _ROOT / "configs" / f"{args.model}.yaml"
    root = args.output / "store"
    resolve_policy(args.model)  # prepared before the clock of the run starts
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "trace_opd.flows", str(config_path), "--run"]
    run = subprocess.run([*command, "--store", str(root.resolve())], env=os.environ | _QUIET)
    if run.returncode:
        sys.exit(run.returncode)  # it has said why
    seconds = time.perf_counter() - started
    config = load_config(PipelineConfig, config_path)
    result = summary(args.model, config, Store(root.resolve()), seconds)
    path = args.output / "summary.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print_summary(result, path)


def summary(model: str, config: PipelineConfig, store: Store, seconds: float) -> dict[str, Any]:
    """The run's figures and paths, relative to the working folder."""
    evaluation = store.get(f"{config.name}-evaluation").summary
    metric = f"avg@{evaluation['k']}"
    train = store.get(f"{config.name}-train")

    def pass_rate(role: str) -> dict[str, Any]:
        estimate = evaluation["policies"][role][metric]
        return {"pass_rate": estimate["value"], "ci95": estimate["ci95"]}

    return {
        "model": model,
        "seconds": round(seconds, 1),
        "before": pass_rate("base"),
        "after": pass_rate("trained"),
        "datasets": {t: _relative(store.get(f"{config.name}-{t}").path()) for t in _TABLES},
        "checkpoint": _relative(train.path(train.summary["checkpoint"])),
        "report": _relative(train.path("report.html")),
    }


def print_summary(result: dict[str, Any], path: Path) -> None:
    console = Terminal()
    table = Table("policy", "pass rate", "95 % interval", title=f"{result['model']}: held-out")
    for role in ("before", "after"):
        low, high = result[role]["ci95"]
        table.add_row(role, f"{result[role]['pass_rate']:.1%}", f"{low:.1%} – {high:.1%}")
    console.print(table)
    for name, place in {**result["datasets"], "checkpoint": result["checkpoint"]}.items():
        console.print(f"{name:12} {place}", soft_wrap=True, highlight=False)
    console.print(f"{'report':12} {result['report']}", soft_wrap=True, highlight=False)
    console.print(f"{'summary':12} {path}  ({result['seconds']:.0f} s)", highlight=False)


def _relative(path: str) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    main()
