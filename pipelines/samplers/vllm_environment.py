"""What vLLM reads of the environment, and what it logs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ...schemas.errors import InputError

_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def import_quietly() -> Any:
    """The module vllm, which reports to nobody and logs warnings alone."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    return import_module("vllm")


@contextmanager
def engine_environment(in_process: bool, on_gpu: bool) -> Iterator[None]:
    """What vLLM reads of the environment while it starts an engine."""
    during: dict[str, str | None] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    # An engine's process is none of torchrun's, but it works on the GPU of the rank it belongs to.
    if on_gpu and (rank := os.environ.get("LOCAL_RANK")) is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else None
        if devices is not None and int(rank) >= len(devices):
            raise InputError(
                f"CUDA_VISIBLE_DEVICES={visible}: names no device for LOCAL_RANK={rank}; start as many "
                "processes as it names devices"
            )
        during["CUDA_VISIBLE_DEVICES"] = devices[int(rank)] if devices is not None else rank
    for variable in os.environ:
        if variable.startswith("TORCHELASTIC_") or variable in _TORCHRUN:
            during[variable] = None
    before = {variable: os.environ.get(variable) for variable in during}
    _set_variables(during)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for variable, value in values.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _without_rotary(record: logging.LogRecord) -> bool:
    """Rotary embeddings have no weights; vLLM warns that it loaded none at each reload."""
    return "RotaryEmbedding" not in record.getMessage()


logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_without_rotary)
