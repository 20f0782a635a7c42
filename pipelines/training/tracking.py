"""Where a training run's metrics go: metrics.jsonl always, and a board of the user's choice."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ...data.atomic import write_atomic, writing
from ...schemas.errors import InputError

TrackerKind = Literal["tensorboard", "trackio", "wandb", "none"]
METRICS = "metrics.jsonl"
_PROJECT = "trace-opd"


@dataclass(frozen=True)
class Board:
    """An open board. log: takes a step and its numbers by name; close: sends what is left."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


class Tracker:
    """Appends each step's metrics; a resumed run goes on where its checkpoint was written.

    metrics.jsonl and TensorBoard hold a step once `log` returns. W&B and trackio send from a process
    or thread of their own: `close` waits for them, a kill may cost them the last second.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        kind: TrackerKind = "tensorboard",
        ref: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        """folder: the run's; ref: its dataset, which names the run on W&B and trackio.

        Raises InputError if the board's package is not installed.
        """
        check_tracker(kind)
        self._path = folder / METRICS
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        # Replaced whole: a kill here must not lose the steps before the checkpoint.
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with writing(folder):
            self._board = _open_board(kind, folder, first_step, ref, config or {})

    def log(self, metrics: dict[str, Any]) -> None:
        """One step: a JSON line, on the disk before this returns, and the board's numbers."""
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that follows
        if self._board is not None:
            numbers: dict[str, float] = {
                name: value
                for name, value in metrics.items()
                if name != "step" and isinstance(value, int | float)
            }
            with writing(self._path.parent):
                self._board.log(metrics["step"], numbers)

    def close(self) -> None:
        if self._board is not None:
            with writing(self._path.parent):
                self._board.close()


def check_tracker(kind: TrackerKind) -> None:
    """Raises InputError if the package of the board is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise InputError(
            f"tracker {kind}: is not installed; `pip install {kind}`, or set tracker=none "
            "(metrics.jsonl is written either way)"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A torn line ends the reading."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _open_board(
    kind: TrackerKind, folder: Path, first_step: int, ref: str, config: dict[str, Any]
) -> Board | None:
    if kind == "tensorboard":
        return _tensorboard(folder / "tensorboard", first_step)
    if kind == "wandb":
        return _wandb(folder, ref, config)
    if kind == "trackio":
        return _trackio(ref, config)
    return None


def _tensorboard(folder: Path, first_step: int) -> Board:
    from torch.utils.tensorboard import SummaryWriter

    # Steps that a resumed run repeats replace those from before.
    writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Board(log, writer.close)


def _wandb(folder: Path, ref: str, config: dict[str, Any]) -> Board:
    """WANDB_MODE, WANDB_PROJECT and the rest of W&B's environment hold."""
    run = import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=ref,
        id=ref.replace("/", "-"),  # W&B allows no slash in ids
        resume="allow",
        dir=str(folder),
        config=config,
    )
    # W&B keeps the first value of a step that a resumed run repeats; the two are equal.
    return Board(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _trackio(ref: str, config: dict[str, Any]) -> Board:
    """TRACKIO_DIR, TRACKIO_SPACE_ID and the rest of trackio's environment hold."""
    run = import_module("trackio").init(
        project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=ref,
        resume="allow",
        config=config,
    )
    # A step that a resumed run repeats stands there twice, with equal values.
    return Board(lambda step, numbers: run.log(numbers, step=step), run.finish)
