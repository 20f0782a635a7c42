"""Writes a training run's metrics: metrics.jsonl always, and to the board that the user chose.

Stage train opens one `Tracker` on the first rank. metrics.jsonl is the training's own record, and
a failure to write it ends the run. A board is a convenience: one that fails is warned of once, and
the training goes on without it.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...data.atomic import write_atomic, writing
from ...schemas.errors import shortened
from ..run_metrics import METRICS, read_metrics
from .boards import Board, BoardRun, Row, TrackerKind, check_tracker, open_board

logger = logging.getLogger(__name__)

_CLOSE_S = 300.0  # W&B waits without end for a server that does not answer


class Tracker:
    """Appends each step's metrics; a resumed run continues after its checkpoint.

    metrics.jsonl and TensorBoard hold a step once `log` returns. W&B and trackio send from a
    process or thread of their own: `close` waits for it, a kill may lose the last second.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        kind: TrackerKind = "tensorboard",
        ref: str = "",
        config: dict[str, Any] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """folder: the run's; the others: see `BoardRun`.

        Raises InputError if the board's package is not installed.
        """
        check_tracker(kind)
        self._path, self._kind = folder / METRICS, kind
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        # Replaced atomically: a kill here must not lose the steps before the checkpoint.
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board: Board | None = None
        with self._tolerated():
            run = BoardRun(folder, ref, first_step, config or {}, facts or {})
            self._board = open_board(kind, run)

    def log(
        self,
        metrics: Mapping[str, Any],
        figures: Mapping[str, float] | None = None,
        completions: Sequence[Row] = (),
    ) -> None:
        """Write a step: a JSON line of its metrics, on disk before this returns, and to the board
        their numbers, further figures and a table of completions, if there are any.
        """
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that follows
        if self._board is None:
            return
        numbers: dict[str, float] = {
            name: value
            for name, value in [*metrics.items(), *(figures or {}).items()]
            if name != "step" and isinstance(value, int | float)
        }
        with self._tolerated():
            self._board.log(metrics["step"], numbers)
            if completions:
                self._board.table(metrics["step"], completions)

    def close(self) -> None:
        if self._board is not None:
            with self._tolerated():
                _within(_CLOSE_S, self._board.close)

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Turns what a board raises, which may be anything, into one warning."""
        try:
            yield
        except Exception as error:
            logger.debug("tracker failed", exc_info=True)
            logger.warning(
                "tracker %s failed (%s: %s); the training goes on without it, metrics.jsonl has "
                "every step",
                self._kind,
                type(error).__name__,
                shortened(error),
            )
            self._board = None


def _within(seconds: float, close: Callable[[], None]) -> None:
    """Call in a thread, which is left behind when the time is up.

    Raises TimeoutError then, or what the call raises.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            close()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tracker-close", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it was not done sending after {seconds:.0f} s")
    if failed:
        raise failed[0]
