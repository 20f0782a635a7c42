"""Writes a training run's metrics: metrics.jsonl always, and to the board that the user chose.

Stage train opens one `Tracker` on the first rank.
"""

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
from ..run_metrics import METRICS, read_metrics

TrackerKind = Literal["tensorboard", "trackio", "wandb", "none"]
_PROJECT = "trace-opd"


@dataclass(frozen=True)
class Board:
    """An open board. log: takes a step and its numbers by name; close: sends unsent numbers."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


class Tracker:
    """Appends each step's metrics; a resumed run continues after its checkpoint.

    metrics.jsonl and TensorBoard hold a step once `log` returns. W&B and trackio send from their
    own
    process or thread: `close` waits for it, a kill may lose the last second.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        kind: TrackerKind = "tensorboard",
        ref: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        """folder: the run's; ref: its dataset's, the run's name on W&B and trackio.

        Raises InputError if the board's package is not installed.
        """
        check_tracker(kind)
        self._path = folder / METRICS
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        # Replaced atomically: a kill here must not lose the steps before the checkpoint.
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with writing(folder):
            self._board = _open_board(kind, folder, first_step, ref, config or {})

    def log(self, metrics: dict[str, Any]) -> None:
        """Write a step: a JSON line, on disk before this returns, and the board's numbers."""
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

    # Steps that a resumed run repeats replace the earlier ones.
    writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Board(log, writer.close)


def _wandb(folder: Path, ref: str, config: dict[str, Any]) -> Board:
    """W&B reads WANDB_MODE and its other environment variables."""
    run = import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=ref,
        id=ref.replace("/", "-"),  # W&B allows no slash in ids
        resume="allow",
        dir=str(folder),
        config=config,
    )
    # W&B keeps the first value of a step that a resumed run repeats; both are equal.
    return Board(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _trackio(ref: str, config: dict[str, Any]) -> Board:
    """trackio reads TRACKIO_DIR, TRACKIO_SPACE_ID and its other environment variables."""
    run = import_module("trackio").init(
        project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=ref,
        resume="allow",
        config=config,
    )
    # trackio keeps both values of a step that a resumed run repeats; they are equal.
    return Board(lambda step, numbers: run.log(numbers, step=step), run.finish)
