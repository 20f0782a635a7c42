"""Where a training run's metrics go: metrics.jsonl, and TensorBoard event files beside it."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Appends each step's metrics; a resumed run goes on where its checkpoint was written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        # Replaced whole: a kill here must not lose the steps before the checkpoint.
        rewritten = folder / "metrics.jsonl.tmp"
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        rewritten.replace(self._path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, metrics: dict[str, Any]) -> None:
        """One step: a JSON line, and a scalar per number."""
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A line torn by a kill ends the reading."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
