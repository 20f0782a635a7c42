"""The trackers that a training may log to: TensorBoard, W&B, trackio, MLflow.

tracking.py opens one `Board` on the first rank. A board's calls may raise anything; its caller
goes on without it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ...schemas.errors import InputError

TrackerKind = Literal["tensorboard", "trackio", "wandb", "mlflow", "none"]
Row = dict[str, Any]
PROJECT = "trace-opd"
TABLE = "completions"
_DATASET_TAG = "trace_opd.dataset"
_MOST_PARAMS = 100  # of one request to MLflow
_LONGEST_PARAM = 500  # characters, the limit of MLflow's older servers


@dataclass(frozen=True)
class BoardRun:
    """What a board records of a run.

    folder: the run's own; ref: its dataset's, the run's name; first_step: the next one to log;
    config: the training's; facts: what it was made from, by name (dataset, preset, inputs).
    """

    folder: Path
    ref: str
    first_step: int
    config: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Board:
    """An open board.

    log: takes a step and its numbers by name; table: a step and rows of equal keys; close: sends
    what is unsent.
    """

    log: Callable[[int, dict[str, float]], None]
    table: Callable[[int, Sequence[Row]], None]
    close: Callable[[], None]


def check_tracker(kind: TrackerKind) -> None:
    """Raises InputError if the package of the board is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise InputError(
            f"tracker {kind}: is not installed; `pip install {kind}`, or set tracker=none "
            "(metrics.jsonl is written either way)"
        )


def open_board(kind: TrackerKind, run: BoardRun) -> Board | None:
    """The board of a kind; None for none. A resumed run goes on in the board's own run of its
    name.
    """
    openers = {
        "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow,
    }  # fmt: skip
    return openers[kind](run) if kind in openers else None


def _tensorboard(run: BoardRun) -> Board:
    from torch.utils.tensorboard import SummaryWriter

    # Steps that a resumed run repeats replace the earlier ones.
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
    # JSON in Markdown's form of code: each line begins with blanks.
    recorded = json.dumps(run.facts | {"config": run.config}, indent=2, ensure_ascii=False)
    writer.add_text("run", _indented(recorded), run.first_step)

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def table(step: int, rows: Sequence[Row]) -> None:
        writer.add_text(TABLE, "\n\n---\n\n".join(map(_as_markdown, rows)), step)
        writer.flush()

    return Board(log, table, writer.close)


def _as_markdown(row: Row) -> str:
    """Short values in one line; texts, which may hold anything, as code."""
    long = ("problem", "response")
    facts = " · ".join(f"{name} {value}" for name, value in row.items() if name not in long)
    return "\n\n".join([facts, *(_indented(str(row[name])) for name in long)])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _wandb(run: BoardRun) -> Board:
    """W&B reads WANDB_MODE and its other environment variables."""
    wandb = import_module("wandb")
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.ref,
        id=run.ref.replace("/", "-"),  # W&B allows no slash in ids
        resume="allow",
        dir=str(run.folder),
        config=run.config | run.facts,
    )

    def table(step: int, rows: Sequence[Row]) -> None:
        columns = list(rows[0])
        data = [[row[name] for name in columns] for row in rows]
        opened.log({TABLE: wandb.Table(columns=columns, data=data)}, step=step)

    # W&B keeps the first value of a step that a resumed run repeats; both are equal.
    return Board(lambda step, numbers: opened.log(numbers, step=step), table, opened.finish)


def _trackio(run: BoardRun) -> Board:
    """trackio reads TRACKIO_DIR, TRACKIO_SPACE_ID and its other environment variables."""
    trackio, pandas = import_module("trackio"), import_module("pandas")
    opened = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=run.ref,
        resume="allow",
        config=run.config | run.facts,
    )

    def table(step: int, rows: Sequence[Row]) -> None:
        opened.log({TABLE: trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)

    # trackio keeps both values of a step that a resumed run repeats; they are equal.
    return Board(lambda step, numbers: opened.log(numbers, step=step), table, opened.finish)


def _mlflow(run: BoardRun) -> Board:
    """MLflow reads MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other environment variables.

    Its runs have ids of their own; a resumed run is found by the tag with its dataset.
    """
    tracking, entities = import_module("mlflow.tracking"), import_module("mlflow.entities")
    client = tracking.MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    where = experiment.experiment_id if experiment else client.create_experiment(name)
    same = f"tags.`{_DATASET_TAG}` = '{run.ref}'"
    if found := client.search_runs([where], same, max_results=1):
        opened = found[0]
        client.update_run(opened.info.run_id, status="RUNNING")
    else:
        tags = {_DATASET_TAG: run.ref}
        opened = client.create_run(where, run_name=run.ref, tags=tags)
    run_id = opened.info.run_id
    # A value of MLflow's parameters never changes, and operational settings may: the newest
    # config is the artifact.
    client.log_dict(run_id, run.facts | {"config": run.config}, "run.json")
    new = {k: v for k, v in _flat(run.facts | run.config) if k not in opened.data.params}
    params = [entities.Param(key, value) for key, value in new.items()]
    for first in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])

    def log(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [entities.Metric(name, value, now, step) for name, value in numbers.items()]
        client.log_batch(run_id, metrics=metrics)

    def table(step: int, rows: Sequence[Row]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        # A file per step: MLflow appends to one that exists, so a resumed run removes nothing.
        client.log_table(run_id, columns, f"{TABLE}/step-{step:06}.json")

    return Board(log, table, lambda: client.set_terminated(run_id))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted names, as MLflow's parameters."""
    for key, held in value.items():
        if isinstance(held, dict):
            yield from _flat(held, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(held)[:_LONGEST_PARAM]
