"""What a vLLM engine does to its process: environment, logs, process group, calls that notice its
end (vllm.py).
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib import import_module
from io import StringIO
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from ...schemas.errors import EngineEnded, InputError
from ..progress import count_tokens

_T = TypeVar("_T")
_POLL_S = 1.0  # between checks that the engine's process lives

_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def import_quietly() -> Any:
    """The module vllm, with telemetry disabled and only warnings logged."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    return import_module("vllm")


@contextmanager
def engine_environment(in_process: bool, one_gpu: bool) -> Iterator[None]:
    """The environment in which vLLM starts an engine. one_gpu: on the GPU of its rank.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES has no device for this rank.
    """
    during: dict[str, str | None] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    # The engine's process is not one of torchrun's ranks, but it uses the GPU of its rank. In the
    # trainer's process an engine takes its rank and GPU from torchrun's variables.
    if one_gpu and not in_process and (rank := os.environ.get("LOCAL_RANK")) is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else None
        if devices is not None and int(rank) >= len(devices):
            raise InputError(
                f"CUDA_VISIBLE_DEVICES={visible}: names no device for LOCAL_RANK={rank}; start "
                "as many "
                "processes as it names devices"
            )
        during["CUDA_VISIBLE_DEVICES"] = devices[int(rank)] if devices is not None else rank
    for variable in os.environ:
        if not in_process and (variable.startswith("TORCHELASTIC_") or variable in _TORCHRUN):
            during[variable] = None
    before = {variable: os.environ.get(variable) for variable in during}
    _set_variables(during)
    try:
        yield
    finally:
        _set_variables(before)


@contextmanager
def default_group_kept() -> Iterator[None]:
    """An engine that shuts down in this process destroys its own process groups alone, not the
    default one, which the trainer has made and needs.
    """
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


class Finished(tqdm):
    """What vLLM takes for its progress bar: counts responses as they end, and prints nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"file": StringIO()})

    def update(self, n: float | None = 1) -> bool | None:
        if self.iterable is None:  # else it counts the requests that vLLM is given
            count_tokens(0, responses=int(n or 0))
        return super().update(n)


def ask_process(processes: Sequence[Any], call: Callable[[], _T]) -> _T:
    """The result of a call to an engine that runs in `processes`. vLLM blocks forever if its engine
    process dies, so poll the process.

    Raises:
        EngineEnded: a process has ended.
    """
    answer: Future[_T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    while not wait([answer], timeout=_POLL_S).done:
        _require_alive(processes)
    if answer.exception() is not None:
        _require_alive(processes)
    return answer.result()


def _require_alive(processes: Sequence[Any]) -> None:
    if not all(process.is_alive() for process in processes):
        raise EngineEnded(
            "sampler vllm: the engine's process has ended; give the same command again, it goes on "
            "from what is finished"
        )


def _set_variables(values: dict[str, str | None]) -> None:
    for variable, value in values.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _without_rotary(record: logging.LogRecord) -> bool:
    """Rotary embeddings have no weights; at each reload vLLM warns that it loaded none."""
    return "RotaryEmbedding" not in record.getMessage()


logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_without_rotary)
