"""Measures a GPU in half an hour: ceilings, the loss, a training step, a cut of 8B, sampling.

    make bench-gpu                                                   # 27 minutes
    python benchmarks/gpu.py --parts loss --minutes 9                # then step; layers,rollout
    python benchmarks/gpu.py --device cpu --shape tiny --minutes 2   # a rehearsal

The parts are gpu_parts.py's. Each command of a part is a process with a limit of its own; time that
a part leaves over, those behind it have. A row is appended to benchmarks/results/gpu-CARD.jsonl as
soon as it is measured, with card, driver, versions, date and part, and so is each command that has
finished: the same call again takes up where the last one ended. To measure all anew, move the file
away. At the end a table compares the rows with the targets (gpu_gates.py).

For a machine without a network: what is missing is printed first, and what needs it is left out.
The repository need not be installed. A machine that has PyTorch, transformers, pyarrow and rich
needs wheels of pydantic, pydantic-core, annotated-types and typing-inspection; for steps also of
jsonschema, jsonschema-specifications, referencing, rpds-py and attrs; for the peers of trl,
datasets, dill, multiprocess and liger-kernel; for sampling of vllm and llguidance.
"""

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from gpu_gates import FINISHED, UNFINISHED, gates, table_of
from gpu_parts import ROOT, Command, Part, parts
from machine import card, cuda_here, stamp
from results import RESULTS, append, console, read_log
from shapes import shape_of

NAMES = ("loss", "step", "layers", "rollout")


def log_of(folder: Path, device: str) -> Path:
    """The file of this machine's card."""
    found = card() if device == "cuda" else None
    name = found[0] if found else "cpu"
    return folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"


def deadlines(chosen: list[Part], minutes: float) -> list[float]:
    """Seconds from the start until each part has to end: shares of the minutes, added up."""
    total, ends, at = sum(part.minutes for part in chosen), [], 0.0
    for part in chosen:
        at += part.minutes / total * 60 * minutes
        ends.append(at)
    return ends


def run(command: Command, seconds: float, log: Path, models: str) -> str:
    """Run a command and everything it starts; returns how it ended: FINISHED, or the reason."""
    process = subprocess.Popen(command.line(log, models), start_new_session=True, cwd=ROOT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    else:
        return FINISHED if code == 0 else f"ended with exit code {code}"
    finally:  # also what it left running
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(chosen: list[Part], minutes: float, log: Path, device: str) -> list[str]:
    """Run what the log does not have; returns a line for each command that did not finish."""
    out, start, unfinished = console(), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="trace-opd-") as models:
        for part, end in zip(chosen, deadlines(chosen, minutes), strict=True):
            for command in part.commands:
                done = {row.get("command") for row in read_log(log) if row["part"] == FINISHED}
                left = end - (time.monotonic() - start)
                if command.name in done:
                    continue
                if command.missing:
                    ended = f"left out: {', '.join(command.missing)} missing"
                elif left < min(command.seconds, 10):
                    ended = "no time left"
                else:
                    out.rule(f"{part.name}: {command.name}", align="left")
                    ended = run(command, min(command.seconds, left), log, models)
                row = {"part": ended if ended == FINISHED else UNFINISHED, "command": command.name}
                append(log, [stamp(device) | row | {"of": part.name, "ended": ended}])
                if ended != FINISHED:
                    unfinished.append(f"{part.name}: {command.name}: {ended}")
    return unfinished


def importable(folder: str) -> None:
    """Let this checkout's processes import it as trace_opd where it is not installed."""
    if find_spec("trace_opd") is None:
        Path(folder, "trace_opd").symlink_to(ROOT)
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def main() -> None:
    parser = argparse.ArgumentParser(description="Half an hour of measurements on one GPU.")
    parser.add_argument("--parts", default=",".join(NAMES), help="subset, in the order given")
    parser.add_argument("--minutes", type=float, default=27)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if cuda_here() else "cpu"
    )
    parser.add_argument("--shape", help="of all parts, with few tokens: a rehearsal")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    if options.device == "cpu" and options.shape is None:
        parser.error("no GPU: nvidia-smi finds none; rehearse with --device cpu --shape tiny")
    try:
        shape_of(options.shape or "tiny")
    except ValueError as error:
        parser.error(str(error))
    out, log = console(), log_of(options.results, options.device)
    every = {part.name: part for part in parts(options.shape, options.device)}
    chosen = [every[name] for name in names]
    missing = {name for part in chosen for command in part.commands for name in command.missing}
    missing |= {name for name in ("trl", "liger_kernel") if find_spec(name) is None}
    if missing:
        out.print(f"Missing, and what needs it is left out: {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory(prefix="trace-opd-") as folder:
        importable(folder)
        unfinished = measure(chosen, options.minutes, log, options.device)
    for line in unfinished:
        out.print(line, markup=False, highlight=False)
    out.print(table_of(gates(read_log(log)), log))


if __name__ == "__main__":
    main()
