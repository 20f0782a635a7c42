"""Predicts a training run's memory per GPU and seconds per step, before anything is loaded.

`trace-opd plan` prints `plan_table`; stage train announces `memory_line`. Memory is counted, not
fitted: what the trainer holds, and what autograd keeps per token of a layer (`activation_bytes`).
Seconds are floating-point operations over a throughput, without waiting for the verifier, the
annotator and the disk.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from rich.table import Table

from ...schemas.configs import TrainConfig
from ...schemas.errors import InputError
from ...trace.fused import BUFFER_BYTES
from ..models import resolve_policy
from ..samplers import sampling_engine
from ..samplers.engine import Engine
from .model_shape import ModelShape, model_shape
from .throughput import measured_rates

# By (adapters, computing in bfloat16): bytes that autograd keeps per token and layer for each unit
# of the hidden size, the intermediate size, queries, normalised queries and keys, and the rank of
# the adapters on seven projections.
_KEPT = {
    (False, False): (24, 16, 20, 8, 0),
    (False, True): (26, 8, 10, 6, 0),
    (True, False): (16, 16, 20, 4, 28),
    (True, True): (18, 8, 10, 4, 14),
}
_ADAM_STATES = 2


@dataclass(frozen=True)
class Setting:
    """A config, its model's shape, and the hardware.

    prompt_tokens, response_tokens: mean lengths that the plan assumes.
    """

    config: TrainConfig
    shape: ModelShape
    gpus: int
    device: Literal["cpu", "cuda"]
    bfloat16: bool
    prompt_tokens: int
    response_tokens: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step on one GPU; a prompt counts once per group."""
        group = self.prompt_tokens + self.config.online.group_size * self.response_tokens
        return -(-self.config.groups_per_step * group // self.gpus)

    @property
    def micro_batch_tokens(self) -> int:
        return min(self.config.micro_batch_tokens, self.step_tokens)

    @property
    def most_tokens(self) -> int:
        """Of a prompt and a response at its limit."""
        return self.prompt_tokens + self.config.online.sampling.max_new_tokens

    @property
    def engine(self) -> Engine:
        return sampling_engine(self.config.sampler, self.config.policy)

    @property
    def rows_at_once(self) -> float:
        """Responses that a GPU's sampler works on together."""
        responses = self.config.groups_per_step * self.config.online.group_size
        budget = self.engine.batch_tokens
        limit = responses if budget is None else max(1, budget // self.most_tokens)
        return min(responses / self.gpus, limit)

    @property
    def weight_bytes(self) -> int:
        """Per weight of the policy and its copies; with adapters the base stays in low
        precision.
        """
        return 2 if self.config.lora and self.bfloat16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU by name: held all the time, and added in each phase."""

    held: dict[str, int]
    training: dict[str, int]
    update: dict[str, int]
    sampling: dict[str, int]

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        return {"training": self.training, "update": self.update, "sampling": self.sampling}

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(p.values()) for p in self.phases.values())


def setting(
    config: TrainConfig,
    gpus: int | None = None,
    prompt_tokens: int = 256,
    response_tokens: int | None = None,
) -> Setting:
    """gpus: number of GPUs to plan for; None: this machine, one GPU or the CPU.

    response_tokens: mean length; None: the limit, online.sampling.max_new_tokens.

    Raises:
        InputError: the policy's config cannot be read.
    """
    policy = config.policy
    here = "cuda" if torch.cuda.is_available() or gpus is not None else "cpu"
    device = here if policy.device == "auto" else policy.device
    return Setting(
        config=config,
        shape=model_shape(
            resolve_policy(policy.path, weights=False), config.lora, policy.trust_remote_code
        ),
        gpus=gpus or 1,
        device=device,  # type: ignore[arg-type] - one of the two
        bfloat16=policy.precision == "bfloat16"
        or (policy.precision == "auto" and device == "cuda"),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens or config.online.sampling.max_new_tokens,
    )


def activation_bytes(where: Setting) -> int:
    """Bytes per token that autograd keeps for one layer, attention over packed rows included.

    The inputs of norms and projections, both factors of the gated MLP, queries, the keys and values
    repeated to their heads, attention's output twice (by sequence, joined), and a few numbers per
    token and head. Frozen projections keep no inputs, adapters keep theirs.
    """
    shape, lora = where.shape, where.config.lora
    hidden, inner, queries, normed, rank = _KEPT[lora is not None, where.bfloat16]
    numbers = 2 + shape.heads
    total = hidden * shape.hidden + inner * shape.intermediate + queries * shape.queries
    if shape.normalises_queries:
        total += normed * (shape.queries + shape.keys)
        numbers += shape.heads + shape.key_heads
    return total + 4 * numbers + rank * (lora.rank if lora else 0)


def predict_memory(where: Setting) -> Memory:
    """Peak memory in each phase of a step while λ > 0, without the allocator's slack."""
    config, shape, shards = where.config, where.shape, where.gpus
    adapters = shape.trainable if config.lora else 0
    weights = (where.weight_bytes * shape.parameters + 4 * adapters) // shards
    trained = 4 * shape.trainable // shards
    held = {"weights": weights, "AdamW states": _ADAM_STATES * trained}
    if config.schedule.w0:
        held["teacher"] = weights
    if config.loss.reference_kl:
        held["reference"] = weights
    training = {"gradients": trained} | _in_flight(where)
    # PyTorch's AdamW updates all weights at once on CUDA, one tensor after another on the CPU.
    temporary = trained if where.device == "cuda" else 8 * shape.head
    update = {"gradients": trained, "AdamW temporaries": temporary}
    # An engine with weights of its own has its own limit (vLLM's gpu_memory_utilization).
    sampling = config.online.steps and not where.engine.follows
    return Memory(held, training, update, _sampling(where) if sampling else {})


def _in_flight(where: Setting) -> dict[str, int]:
    """A micro-batch's memory at its peak, before its backward pass."""
    config, shape, tokens = where.config, where.shape, where.micro_batch_tokens
    per_layer = activation_bytes(where)
    if config.gradient_checkpointing:
        # Inputs of all layers, and everything of the one layer that is recomputed.
        layers = shape.layers * where.weight_bytes * shape.hidden + per_layer
    else:
        layers = shape.layers * per_layer
    # Outside the layers: embeddings, final norm, the states that the loss reads and their gradient.
    ends = 16 * shape.hidden + 8 * shape.head_dim + 12
    logits = 4 * shape.vocab
    rows = min(tokens, max(2, BUFFER_BYTES[where.device] // logits))
    low = where.bfloat16
    parts = {
        "activations": tokens * (layers + ends),
        "logits of a chunk": rows * (logits + (2 * shape.vocab if low else 0)),
    }
    if config.lora is None:
        parts["head gradient"] = 4 * shape.head
    if where.gpus > 1:
        gathered = (1 if shape.tied else 2) * shape.head + 2 * shape.linear // shape.layers
        parts["gathered weights"] = (2 if low else 4) * gathered
    elif low and config.lora is None:
        parts["bfloat16 weights"] = 2 * (shape.linear + shape.head)
    return parts


def _sampling(where: Setting) -> dict[str, int]:
    """Sampling with the trained policy: key-value cache and logits at the token budget."""
    config, shape, low = where.config, where.shape, where.bfloat16
    rows, limit = ceil(where.rows_at_once), where.most_tokens
    # Keys are float32 after rotary embeddings; values have the projection's precision.
    entry = shape.keys * ((6 if low else 8) if where.weight_bytes == 4 else 4)
    parts = {
        # One layer's cache is copied when it grows.
        "key-value cache": (shape.layers + 1) * entry * rows * limit,
        "sampling distributions": 4 * 4 * rows * shape.vocab,
    }
    if where.gpus > 1:
        parts["unsharded weights"] = where.weight_bytes * shape.parameters
    if low and config.lora is None:
        parts["bfloat16 weights"] = 2 * (shape.linear + shape.head)
    return parts


def predict_seconds(where: Setting, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step's parts on each GPU. flops: per second; bandwidth: bytes per second.

    A product takes 2 operations per weight and token; its two gradients 4, its recomputation 2. A
    decoding step takes the longer of reading every weight once for all rows, and computing.
    """
    config, shape, tokens = where.config, where.shape, where.step_tokens
    sequence = where.prompt_tokens + where.response_tokens
    # Scores and mixing, over half of the sequence on average.
    attention = 2 * shape.layers * shape.queries * sequence
    forward = 2 * shape.linear + attention
    passes = (2 if config.lora else 3) + (1 if config.gradient_checkpointing else 0)
    head_passes = 2 if config.lora else 3
    seconds = {"training": tokens * (passes * forward + head_passes * 2 * shape.head) / flops}
    if config.schedule.w0:
        share = config.online.routing.alpha if config.online.routing.rule != "all" else 1.0
        # At most: the teacher stops at a response's last routed token.
        seconds["teacher, while λ > 0"] = tokens * (forward + share * 2 * shape.head) / flops
    if config.loss.reference_kl:
        seconds["reference"] = tokens * (forward + 2 * shape.head) / flops
    if config.online.steps:
        responses = config.groups_per_step * config.online.group_size / where.gpus
        rows = where.rows_at_once
        weights = (2 if where.bfloat16 else 4) * (shape.linear + shape.head)
        one = max(weights / bandwidth, rows * (forward + 2 * shape.head) / flops)
        seconds["sampling"] = responses / rows * where.response_tokens * one
    return seconds


def plan_table(
    config: TrainConfig,
    gpus: int | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    prompt_tokens: int = 256,
    response_tokens: int | None = None,
) -> Table:
    """The prediction as a table; rates that are not given are measured if the device is here.

    Raises:
        InputError: the policy's config cannot be read.
    """
    where = setting(config, gpus, prompt_tokens, response_tokens)
    memory = predict_memory(where)
    table = Table("per GPU" if where.device == "cuda" else "this machine", "", box=None)
    table.columns[1].justify = "right"
    table.add_row("parameters", f"{where.shape.parameters:,}")
    table.add_row("trained", f"{where.shape.trainable:,}")
    for phase, parts in {"held": memory.held, **memory.phases}.items():
        for name, size in parts.items():
            table.add_row(f"{phase}: {name}", _size(size))
    table.add_row("peak memory", _size(memory.peak))
    flops, bandwidth = (tflops or 0) * 1e12, (bandwidth_gbs or 0) * 1e9
    if where.device == "cpu" or torch.cuda.is_available():
        measured = (
            (0.0, 0.0) if flops and bandwidth else measured_rates(where.device, where.bfloat16)
        )
        flops, bandwidth = flops or measured[0], bandwidth or measured[1]
    if not flops or not bandwidth:
        table.add_row("seconds per step", "give --tflops and --bandwidth: no such device here")
        return table
    seconds = predict_seconds(where, flops, bandwidth)
    for name, value in seconds.items():
        table.add_row(f"seconds: {name}", f"{value:,.2f}")
    table.add_row("seconds per step, at most", f"{sum(seconds.values()):,.2f}")
    table.add_row("at", f"{flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s")
    table.add_row("tokens per step", f"{where.step_tokens:,}")
    return table


def memory_line(config: TrainConfig, processes: int = 1) -> str:
    """A line for the start of a run on this machine."""
    try:
        memory = predict_memory(replace(setting(config), gpus=processes))
    except InputError as error:
        return f"memory: not planned ({error})"
    held, training = memory.held, memory.training
    parts = {**held, "gradients": training["gradients"], "activations": training["activations"]}
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"memory: {_size(memory.peak)} at its peak ({named})"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
