"""Counts a training run's memory per GPU, before anything is loaded.

plan_table.py prints it, fitting.py finds settings that fit a card. Memory is counted, not fitted:
what the trainer holds (trace/trainer.py, trace/sharding.py), what FSDP gathers and reduces, and
what autograd keeps per token of a layer (`activation_bytes`).
"""

from dataclasses import dataclass
from math import ceil

from ...schemas.configs import VllmSampler
from ...trace.fused_call import TRITON_BUFFER_BYTES
from ...trace.fused_torch import BLOCK_BYTES, BUFFER_BYTES
from ...trace.optim import MOMENT_BYTES
from .model_shape import ModelShape
from .plan_setting import Setting

# By (adapters, computing in bfloat16): bytes that autograd keeps per token and layer for each unit
# of the hidden size, the intermediate size, queries, normalised queries and keys, and the rank of
# the adapters on seven projections.
_KEPT = {
    (False, False): (24, 16, 20, 8, 0),
    (False, True): (16, 8, 10, 6, 0),
    (True, False): (16, 16, 20, 4, 28),
    (True, True): (12, 8, 10, 4, 14),
}
STATES = "optimiser states"
ENGINE = ("engine's weights", "engine's cache, at least")
_PROBE_ROWS = 2 * 127  # tokens that a probe of an engine's weights scores (samplers/probe.py)
_CPU_KV_CACHE = 4 << 30  # of vLLM on a CPU (samplers/vllm.py)


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU by name: held all the time, and added at the peak of each phase.

    start: the weights are placed; there are no optimiser states yet. loss: the end of a forward
    pass. backward: of a layer. reduction: of the last gradients, those of embeddings and head.
    update: the optimiser's step. probe: before an engine gets new weights. sampling. host: of the
    machine, in addition to a GPU.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]

    def total(self, phase: str) -> int:
        later = (STATES, *ENGINE) if phase == "start" else ()
        held = sum(size for name, size in self.held.items() if name not in later)
        return held + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)


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
    """Memory in each phase of a step while λ > 0, without the allocator's slack."""
    config = where.config
    phases = {"start": _start(where)} if where.sharded else {}
    phases |= _training(where)
    if config.online.steps:
        phases |= _sampling(where)
    # A part of another setting is left out.
    counted = {name: {k: v for k, v in parts.items() if v} for name, parts in phases.items()}
    return Memory(_held(where), counted, _host(where))


def _held(where: Setting) -> dict[str, int]:
    config, shape, low = where.config, where.shape, where.computed
    adapters = shape.trainable if config.lora else 0
    held = {}
    if not config.optim.offload:
        held["weights"] = (low if config.lora else 4) * shape.parameters + 4 * adapters
        held[STATES] = int(MOMENT_BYTES[config.optim.kind] * shape.trainable)
    if where.taught and where.teacher is not None:
        held["teacher"] = low * where.teacher.parameters
    elif where.taught:
        # With adapters the teacher is the base, or a second adapter on it.
        averaged = 4 if config.teacher.sync == "ema" else low
        second = 4 * adapters if config.teacher.sync != "frozen" else 0
        held["teacher"] = second if config.lora else averaged * shape.parameters
    if config.loss.reference_kl and not config.lora:
        held["reference"] = low * shape.parameters
    held = {name: size // where.gpus for name, size in held.items() if size}
    if isinstance(config.sampler, VllmSampler) and config.online.max_staleness:
        held |= _engine(where)  # it samples while a step trains
    return held


def _start(where: Setting) -> dict[str, int]:
    """Of the last weights that are placed, embeddings and head, which are whole before they are
    split: the student's, or the teacher's, one tensor at a time gathered from the student, or read
    from the files of a model of its own.
    """
    config, shape, low = where.config, where.shape, where.computed
    files = shape.stored_bytes * shape.parameters if where.device == "cpu" else 0
    student = (low if config.lora else 4) * shape.ends + files
    teacher = 0
    if where.taught and (other := where.teacher) is not None:
        read = low * other.parameters
        on_cpu = read if where.device == "cpu" else 0
        teacher = low * other.ends + on_cpu
        student += on_cpu - read // where.gpus  # its files are read, and it is placed later
    elif where.taught and not config.lora:
        each = 4 if config.teacher.sync == "ema" else low
        copied, gathered = each * shape.parameters, 4 * shape.head if where.gpus > 1 else 0
        # Its own shard of embeddings and head is made after the last tensor is gathered.
        teacher = each * shape.ends + max(gathered - each * shape.ends // where.gpus, 0)
        student -= copied // where.gpus  # it is placed before there is a teacher
    return {"whole embeddings and head": max(student, teacher)}


def _training(where: Setting) -> dict[str, dict[str, int]]:
    """Phases of an optimiser step: a micro-batch that is not the step's first, and the update."""
    config, shape, low, shards = where.config, where.shape, where.computed, where.gpus
    tokens, per_layer = where.row_tokens, activation_bytes(where)
    # FSDP gathers embeddings and head for a whole pass, other layers one by one; the teacher's
    # remain gathered until the step's last micro-batch.
    other = where.teacher if where.taught else None
    frozen = sum(bool(x) for x in (where.taught and not other, config.loss.reference_kl))
    copies = 1 + (0 if config.lora else frozen)
    others = low * other.ends if other else 0
    layer = low * (shape.layer + (shape.trainable // shape.layers if config.lora else 0))
    whole_ends = low * shape.ends * copies + others
    gathered = {"gathered embeddings and head": whole_ends} if where.sharded else {}
    # With several ranks one layer's flat buffer lives until the next one is gathered.
    flat = layer if shards > 1 else 0
    trained = 4 * shape.trainable
    # A layer's gradients leave for the host as soon as they are reduced.
    gradients = {"gradients": 0 if config.optim.offload else trained // shards}

    again = where.recomputed_layers
    whole = shape.layers - again
    # Outside the layers: embeddings, norm, the states that the loss reads and their gradient.
    ends = (12 if where.bfloat16 else 16) * shape.hidden + 8 * shape.head_dim + 12
    inputs = again * low * shape.hidden
    forward = {"activations": tokens * (inputs + whole * per_layer + ends)}
    backward = {"activations": tokens * (inputs + max(whole, 1) * per_layer)}

    full = config.lora is None
    # The kernels sum it in the type in which the weights are gathered, PyTorch in float32.
    head = (low if where.sharded and _runs_triton(where) else 4) * shape.head if full else 0
    # The chunk is freed when the head's gradient is cast.
    chunk = max(_chunk_bytes(where), low * shape.head if where.sharded and full else 0)
    loss = gradients | gathered | forward | {"gathered layer": flat, "logits of a chunk": chunk}
    back = gradients | gathered | backward
    phases = {"loss": loss | {"head gradient": head}, "backward": back}
    if other is not None:
        phases["teacher"] = gradients | _teacher_pass(where, other, whole_ends - low * shape.ends)
    if where.sharded:
        trained_layer = shape.layer if full else shape.trainable // shape.layers
        back["gathered layers"] = layer + flat
        back["head gradient"] = low * shape.head if full else 0
        # One layer's are computed while those of the one before are reduced, in float32.
        back["gradients of two layers"] = (low + 4) * trained_layer
    elif shape.tied:
        back["head gradient"] = head
    if where.sharded and full:
        copied = 4 if where.device == "cpu" and shards > 1 else 0  # by gloo
        reduced = (4 + copied) * shape.ends + 4 * shape.ends // shards
        phases["reduction"] = gradients | {
            "gathered embeddings and head": whole_ends - low * shape.ends,
            "gradients of embeddings and head": low * shape.ends + reduced,
        }
    # Fused on CUDA; elsewhere one tensor after another.
    largest = 8 * shape.head // shards if full and where.device == "cpu" else 0
    phases["update"] = gradients | {"AdamW temporaries": largest}
    return phases


def _teacher_pass(where: Setting, other: ModelShape, gathered: int) -> dict[str, int]:
    """A forward pass of a teacher of its own shape: a layer's stream, its norm, and the MLP.

    gathered: bytes of the frozen models' embeddings and heads.
    """
    low = where.computed
    kept = low * where.row_tokens * (2 * other.hidden + 3 * other.intermediate)
    parts = {"activations of a layer": kept}
    if where.sharded:
        parts["gathered embeddings and head"] = gathered
        parts["gathered layers"] = low * other.layer * (2 if where.gpus > 1 else 1)
    return parts


def _runs_triton(where: Setting) -> bool:
    """Whether the loss's kernels run (trace/fused.py): PyTorch for CUDA comes with triton."""
    loss = where.config.loss
    return where.device == "cuda" and loss.backend != "torch" and loss.top_k is None


def _chunk_bytes(where: Setting) -> int:
    """Of the loss's chunk of logits, and of what it computes on: in trace/fused_triton.py nothing,
    in trace/fused_torch.py a block."""
    vocab = where.shape.vocab
    if _runs_triton(where):
        stored = 2 if where.bfloat16 and not where.config.loss.fp32_logits else 4
        return min(2 * where.row_tokens * stored * vocab, TRITON_BUFFER_BYTES)
    rows = min(where.row_tokens, max(2, BUFFER_BYTES[where.device] // (4 * vocab)))
    block = min(rows, max(2, BLOCK_BYTES[where.device] // (4 * vocab)))
    return rows * (4 + (2 if where.bfloat16 else 0)) * vocab + 2 * block * 4 * vocab


def _host(where: Setting) -> dict[str, int]:
    """Of one machine with all GPUs: what is offloaded, and the larger of what the first rank reads
    at the start, and the copy of which a checkpoint is written."""
    config, shape = where.config, where.shape
    # Weights, gradients and two moments.
    offloaded = 16 * shape.trainable if config.optim.offload else 0
    left_out = ("reference", *ENGINE, *(["teacher"] if where.teacher else []))
    copied = sum(size for name, size in _held(where).items() if name not in left_out)
    copied *= where.gpus
    copied += 12 * shape.trainable if offloaded else 0
    files = shape.stored_bytes * shape.parameters
    if where.teacher is not None and where.taught:
        files += where.computed * where.teacher.parameters
    parts = {"weights and optimiser": offloaded}
    if files > copied:
        parts["the model's files at the start"] = files
    else:
        parts["a checkpoint while it is written"] = copied
    return {name: size for name, size in parts.items() if size}


def _sampling(where: Setting) -> dict[str, dict[str, int]]:
    """Sampling, and the check of an engine that has weights of its own.

    A sleeping engine holds about nothing, one that is awake what is free; counted is the least
    that it needs: its weights, and the cache of one response at its limit.
    """
    config, shape, low = where.config, where.shape, where.computed
    if not where.engine.follows:
        return {"sampling": _own_sampling(where)}
    logits = 2 * 4 * shape.vocab * _PROBE_ROWS
    probe = {"logits of a probe": logits}
    if where.sharded:
        layer = low * shape.layer * (2 if where.gpus > 1 else 1)
        probe |= {"gathered weights": low * shape.ends + layer}
    phases = {"probe": probe}
    if isinstance(config.sampler, VllmSampler):
        merged = config.lora is None or config.sampler.adapters == "merge"
        engine = {} if config.online.max_staleness else _engine(where)
        phases["sampling"] = engine | {
            "a tensor handed over": (4 + low) * shape.head if merged else 0
        }
    return phases


def _engine(where: Setting) -> dict[str, int]:
    """Of a vLLM engine that is awake, the least that it needs."""
    sampler = where.config.sampler
    assert isinstance(sampler, VllmSampler), "another sampler has no engine"
    cache = cache_bytes(where)
    if where.device == "cpu":
        cache = int((sampler.kv_cache_gib or 0) * 2**30) or _CPU_KV_CACHE
    weights = where.computed * where.shape.parameters // sampler.tensor_parallel_size
    return dict(zip(ENGINE, (weights, cache), strict=True))


def cache_bytes(where: Setting) -> int:
    """Keys and values of one response at its limit, in an engine."""
    return 2 * where.computed * where.shape.keys * where.shape.layers * where.most_tokens


def _own_sampling(where: Setting) -> dict[str, int]:
    """By a copy of the trained policy: key-value cache and logits at the token budget."""
    shape, low = where.shape, where.computed
    rows, limit = ceil(where.rows_at_once), where.most_tokens
    parts = {
        # One layer's cache is copied when it grows.
        "key-value cache": (shape.layers + 1) * 2 * low * shape.keys * rows * limit,
        "sampling distributions": 4 * 4 * rows * shape.vocab,
    }
    if where.sharded:
        parts["copy of the weights"] = low * shape.parameters
    return parts
