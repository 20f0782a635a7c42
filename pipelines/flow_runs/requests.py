"""What a flow run is asked for: its store, its config and the workers that make its parts."""

import argparse
import os
from pathlib import Path
from typing import Any

from ...schemas.configs import Config, PipelineConfig
from ...schemas.errors import InputError, quoted
from ...schemas.settings import load_config, override, validated
from ..stages import REGISTRY

# Prefect's own limit is 524,288 bytes with the other parameters.
_MOST_PARAMETERS = 500_000
_RUNNERS = ("threads", "processes", "ray", "dask")


def default_store() -> str:
    """The default store: $TRACE_OPD_STORE, else ./store, as an absolute path."""
    return _absolute(os.environ.get("TRACE_OPD_STORE", "store"))


def _absolute(root: str) -> str:
    """A run may start in another folder."""
    return root if "://" in root else str(Path(root).resolve())


def runner_and_workers() -> tuple[str, int]:
    """$TRACE_OPD_TASK_RUNNER (default: threads) and $TRACE_OPD_WORKERS (default: 2).

    - threads: the flow's process has one open engine and makes one part at a time, while another
      thread writes the previous part. More than 2 workers gain nothing but another writer.
    - processes: each worker process has an engine of its own, so as many parts as workers are made
      at once, and each engine takes its own memory.
    - ray, dask: parts run on the cluster at $RAY_ADDRESS or $DASK_SCHEDULER_ADDRESS, which limits
      how many run at once; without an address a cluster with this number of workers runs on this
      machine for the duration of the flow run.

    Raises:
        InputError: an unknown runner, a bad number of workers.
    """
    kind = os.environ.get("TRACE_OPD_TASK_RUNNER", "threads")
    count = os.environ.get("TRACE_OPD_WORKERS", "2")
    if not count.isdecimal() or len(count) > 6 or int(count) < 1:
        raise InputError(f"TRACE_OPD_WORKERS={count}: is not a number of workers; use 1 or more")
    if kind not in _RUNNERS:
        choices = f"{', '.join(_RUNNERS[:-1])} or {_RUNNERS[-1]}"
        raise InputError(f"TRACE_OPD_TASK_RUNNER={kind}: use {choices}")
    return kind, int(count)


def requested_config(kind: type[Any], config: Any, overrides: list[str] | None) -> Any:
    """The config of a flow run, which a deployment gives as JSON.

    Prefect would report a fault of it in pydantic's words, and with a traceback.

    Raises:
        InputError: it is no mapping, or does not fit its model.
    """
    if isinstance(config, Config):
        return override(config, overrides)
    if not isinstance(config, dict):
        raise InputError(f"config: is {quoted(config)}; give a section of keys and values")
    return validated(kind, config, list(overrides or []))


def pipeline_config(path: str | None) -> PipelineConfig:
    """The config of a file, as parameters of a flow run.

    Raises:
        InputError: a fault of the file, or more than Prefect takes.
    """
    loaded = load_config(PipelineConfig, path)
    if (size := len(loaded.model_dump_json())) > _MOST_PARAMETERS:
        raise InputError(
            f"{path}: has {size:,} characters as JSON, and a flow run of Prefect takes "
            f"{_MOST_PARAMETERS:,}; shorten it, or run it without Prefect by `trace-opd pipeline`"
        )
    return loaded


def default_parameters(path: str | None) -> dict[str, dict[str, Any]]:
    """The parameters of each deployment by its flow's name: its section of a pipeline's YAML, an
    empty one where the file has none.

    Raises:
        InputError: as `pipeline_config`.
    """
    if path is None:
        return {name: {} for name in (*REGISTRY, "pipeline")}
    loaded = pipeline_config(path)
    sections = {name: getattr(loaded, name) for name in REGISTRY} | {"pipeline": loaded}
    return {
        name: {"config": {} if one is None else one.model_dump(mode="json")}
        for name, one in sections.items()
    }


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of `python -m trace_opd.flows`, which `trace-opd serve` calls."""
    parser = argparse.ArgumentParser(prog="trace-opd serve", description=description)
    parser.add_argument("config", nargs="?", help="pipeline YAML with default parameters")
    parser.add_argument("--store", default=default_store(), type=_absolute, help="store root")
    parser.add_argument("--run", action="store_true", help="run the pipeline once, then stop")
    parser.add_argument(
        "--crash-dead-runs",
        action="store_true",
        help="create the automation that sets runs whose process died to Crashed, then stop; "
        "serving and --run create it too",
    )
    return parser.parse_args()
