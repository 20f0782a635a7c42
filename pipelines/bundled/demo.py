"""`trace-opd demo`: the method on a bundled model, from problems to an evaluation.

Runs the pipeline of configs/<model>.yaml as Prefect flows on the embedded server, in a folder and
with a prefix of its own: runs/demo and demo- for micro, runs/demo-smollm2 and smollm2- for smollm2.
Then it prints, and writes into summary.json, the pass rate before and after with 95 % intervals and
the paths of the Parquet files and the report. The config is copied there, for the next commands.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from ...data.atomic import make_folders, writing
from ...data.store import Store
from ...schemas.configs import PipelineConfig
from ...schemas.extras import require
from ...schemas.settings import load_config
from ..models import resolve_policy
from ..runtime.signals import handled
from ..terminal import Terminal

FOLDERS = {"micro": Path("runs/demo"), "smollm2": Path("runs/demo-smollm2")}

_CONFIGS = Path(__file__).parents[2] / "configs"  # a wheel has these two
_TABLES = ("problems", "rollouts", "verdicts", "annotations", "routed")
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run_demo(model: str, output: Path | None) -> None:
    """Run a bundled model's pipeline, then print its figures. output: folder of the run.

    Raises:
        InputError: an extra is not installed, or the folder can't be written.
        SystemExit: the run has ended with that code, and printed why.
    """
    require("prefect", "polars", "openai", "math_verify")
    folder = output or FOLDERS[model]
    root = (folder / "store").resolve()
    resolve_policy(model)  # prepared before the run's time is measured
    with writing(folder):
        make_folders(folder)
        config_path = Path(shutil.copy(_CONFIGS / f"{model}.yaml", folder / f"{model}.yaml"))
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "trace_opd.flows", str(config_path), "--run"]
    # The terminal's Ctrl-C reaches both processes: this one waits until the run has ended.
    with (
        subprocess.Popen([*command, "--store", str(root)], env=os.environ | _QUIET) as run,
        handled(lambda number: run.terminate() if number == signal.SIGTERM else None),
    ):
        code = run.wait()
    if code:
        sys.exit(code)  # it has printed its error
    seconds = round(time.perf_counter() - started, 1)
    config = load_config(PipelineConfig, config_path)
    store = os.path.relpath(root)
    about = {"model": model, "name": config.name, "store": store, "seconds": seconds}
    result = about | {"config": os.path.relpath(config_path)} | summary(config.name, Store(root))
    path = folder / "summary.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print_summary(result, path)


def summary(name: str, store: Store) -> dict[str, Any]:
    """Figures and paths of a pipeline's datasets, paths relative to the working folder."""
    made = {role: store.get(f"{name}-{role}") for role in (*_TABLES, "train", "evaluation")}
    evaluation, train = made["evaluation"].summary, made["train"]
    rates = {}
    for when, role in (("before", "base"), ("after", "trained")):
        estimate = evaluation["policies"][role][f"avg@{evaluation['k']}"]
        rates[when] = {"pass_rate": estimate["value"], "ci95": estimate["ci95"]}
    return rates | {
        "datasets": {role: os.path.relpath(made[role].path()) for role in _TABLES},
        "checkpoint": os.path.relpath(train.path(train.summary["checkpoint"])),
        "report": os.path.relpath(train.path("report.html")),
    }


def print_summary(result: dict[str, Any], path: Path) -> None:
    console = Terminal()
    table = Table("policy", "pass rate", "95 % interval", title=f"{result['model']}: held-out")
    for role in ("before", "after"):
        rate, interval = result[role]["pass_rate"], result[role]["ci95"]
        known = rate is not None
        table.add_row(
            role, *((f"{rate:.1%}", "{:.1%} – {:.1%}".format(*interval)) if known else "––")
        )
    console.print(table)
    lines = [f"{result['name']}-{role:12} {place}" for role, place in result["datasets"].items()]
    width = len(f"{result['name']}-") + 12
    places = {key: result[key] for key in ("checkpoint", "report", "config")}
    places["summary"] = f"{path}  ({result['seconds']:.0f} s)"
    lines += [f"{name:{width}} {place}" for name, place in places.items()]
    lines.append(f"To use these datasets: export TRACE_OPD_STORE={result['store']}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
