"""A training's plan for people: memory, seconds, and what to change where it does not fit.

`trace-opd plan` prints `plan_table`, with --json `plan_data`; stage train announces `memory_line`.
"""

from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from ...schemas.configs import TrainConfig, VllmSampler
from ...schemas.errors import InputError
from .fitting import fits, settled, usable_bytes
from .plan import Memory, cache_bytes, predict_memory
from .plan_setting import Setting, setting
from .step_seconds import predict_seconds
from .throughput import measured_rates


def plan_table(
    config: TrainConfig,
    gpus: int | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    prompt_tokens: int = 256,
    response_tokens: int | None = None,
    memory_gb: float | None = None,
) -> Table:
    """The prediction as a table; rates that are not given are measured if the device is here.

    memory_gb: of a GPU; None: of this machine's.

    Raises:
        InputError: the policy's config cannot be read.
    """
    where, limit = _where(config, gpus, prompt_tokens, response_tokens, memory_gb)
    table = Table("per GPU" if where.device == "cuda" else "this machine", "", "", box=None)
    table.columns[1].justify = "right"
    trained = f"{where.shape.trainable:,} trained"
    table.add_row("parameters", f"{where.shape.parameters:,}", trained)
    _add_memory(table, where, limit)
    _add_seconds(table, where, tflops, bandwidth_gbs)
    return table


def plan_data(
    config: TrainConfig,
    gpus: int | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    prompt_tokens: int = 256,
    response_tokens: int | None = None,
    memory_gb: float | None = None,
) -> dict[str, Any]:
    """The prediction of `plan_table` as JSON data: sizes in bytes per GPU, None where unknown.

    Raises:
        InputError: see `plan_table`.
    """
    where, limit = _where(config, gpus, prompt_tokens, response_tokens, memory_gb)
    memory = predict_memory(where)
    flops, bandwidth = _rates(where, tflops, bandwidth_gbs)
    known = bool(flops and bandwidth)
    fitting = None if limit is None else memory.peak <= limit
    return {
        "device": where.device,
        "gpus": where.gpus,
        "parameters": where.shape.parameters,
        "trained": where.shape.trainable,
        "held": memory.held,
        "phases": memory.phases,
        "host": memory.host,
        "peak_bytes": memory.peak,
        "peak_phase": memory.peak_phase,
        "limit_bytes": limit,
        "fits": fitting,
        "fits_with": [] if limit is None or fitting else [str(fit) for fit in fits(where, limit)],
        "seconds_per_step": predict_seconds(where, flops, bandwidth) if known else None,
        "flops_per_second": flops or None,
        "bytes_per_second": bandwidth or None,
        "tokens_per_step": where.step_tokens,
    }


def _where(
    config: TrainConfig,
    gpus: int | None,
    prompt_tokens: int,
    response_tokens: int | None,
    memory_gb: float | None,
) -> tuple[Setting, int | None]:
    """The setting that is planned for, and the bytes of a GPU; None: no GPU."""
    if memory_gb is not None:
        gpus = gpus or 1
    where = setting(config, gpus, prompt_tokens, response_tokens)
    limit = usable_bytes(memory_gb) if where.device == "cuda" else None
    return settled(where, limit), limit


def _add_memory(table: Table, where: Setting, limit: int | None) -> None:
    memory = predict_memory(where)
    table.add_row("held", _size(sum(memory.held.values())), _named(memory.held))
    for phase, parts in memory.phases.items():
        table.add_row(f"+ {phase}", _size(memory.total(phase)), _named(parts))
    table.add_row("peak memory", _size(memory.peak), f"in {memory.peak_phase}")
    table.add_row("host memory", _size(sum(memory.host.values())), _named(memory.host))
    if limit is None:
        return
    if memory.peak <= limit:
        table.add_row("fits", "", f"{_size(limit - memory.peak)} to spare")
        if isinstance(where.config.sampler, VllmSampler) and "sampling" in memory.phases:
            table.add_row("engine's cache", f"{_responses(where, memory, limit)}", "at once")
        return
    table.add_row("does not fit", "", f"{_size(memory.peak - limit)} too much")
    found = [str(fit) for fit in fits(where, limit)]
    for number, text in enumerate(found):
        table.add_row("or" if number else "fits with", "", text)
    if not found:
        table.add_row("", "", "nothing that was tried: lower online.sampling.max_new_tokens")


def _responses(where: Setting, memory: Memory, limit: int) -> str:
    """How many of the longest responses fit into the engine's cache at once."""
    count = 1 + (limit - memory.total("sampling")) // cache_bytes(where)
    return f"{count:,} × {where.most_tokens:,} tokens"


def _add_seconds(
    table: Table, where: Setting, tflops: float | None, bandwidth_gbs: float | None
) -> None:
    flops, bandwidth = _rates(where, tflops, bandwidth_gbs)
    if not flops or not bandwidth:
        missing = "give --tflops and --bandwidth: no such device here"
        table.add_row("seconds per step", "", missing)
        return
    seconds = predict_seconds(where, flops, bandwidth)
    parts = ", ".join(f"{name} {value:,.2f}" for name, value in seconds.items())
    table.add_row("seconds per step", f"{sum(seconds.values()):,.2f}", f"at most: {parts}")
    table.add_row("", "", f"at {flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s")
    table.add_row("tokens per step", f"{where.step_tokens:,}")


def _rates(
    where: Setting, tflops: float | None, bandwidth_gbs: float | None
) -> tuple[float, float]:
    """Operations and bytes per second, as given or as measured here; 0 where neither is known."""
    flops, bandwidth = (tflops or 0) * 1e12, (bandwidth_gbs or 0) * 1e9
    if where.device == "cpu" or torch.cuda.is_available():
        measured = (
            (0.0, 0.0) if flops and bandwidth else measured_rates(where.device, where.bfloat16)
        )
        flops, bandwidth = flops or measured[0], bandwidth or measured[1]
    return flops, bandwidth


def here(config: TrainConfig, processes: int) -> Setting:
    """A training by so many processes on this machine, each with a GPU if there are any.

    Raises:
        InputError: the policy's config cannot be read.
    """
    where = replace(setting(config), gpus=processes)
    return settled(where, usable_bytes() if where.device == "cuda" else None)


def memory_line(config: TrainConfig, processes: int = 1) -> str:
    """A line for the start of a run on this machine."""
    try:
        memory = predict_memory(here(config, processes))
    except InputError as error:
        return f"memory: not planned ({error})"
    phase = memory.peak_phase
    parts = _named(memory.held | memory.phases[phase])
    return f"memory: {_size(memory.peak)} at its peak, {phase} ({parts})"


def _named(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
