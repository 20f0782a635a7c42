"""The models of a training at its start: the student, the teacher and the reference.

trainer.py calls `start_models` once. Frozen models are made from the student's weights, shard by
shard. With adapters they are views of the student: no copy of the base.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..schemas.configs import TrainConfig
from .architecture import check_architecture
from .layers import fuse_layers
from .lora import AdapterView, add_teacher, has_adapters
from .packing import PackedModel
from .policy import Policy
from .ranks import Ranks
from .sharding import (
    Source,
    Stored,
    from_first_rank,
    from_module,
    frozen_types,
    place,
    skeleton,
    trained_types,
)

Frozen = PackedModel | AdapterView


@dataclass
class Models:
    """trained: the student, or a view of its adapters. The frozen ones are None if not needed."""

    student: PackedModel
    trained: Frozen
    teacher: Frozen | None
    reference: Frozen | None


def start_models(
    policy: Policy, config: TrainConfig, ranks: Ranks, other_teacher: Any = None
) -> Models:
    """Place the policy's model on its device, sharded if `Ranks.shards` says so, and the frozen
    models next to it. Every rank has to call.

    other_teacher: of `teacher.model`, from `load_teacher`; None without, and where w0 is 0. The
    teacher's and reference's weights are in the compute type. A moving average is in float32, since
    it moves by less than bfloat16's resolution.

    Raises:
        InputError: an architecture that the trainer does not know; `fuse_layers`.
    """
    check_architecture(policy.model.config, config.policy.trust_remote_code)
    # Scores take the teacher's place (scores.py).
    taught = config.schedule.w0 > 0 and config.teacher.scores is None
    referred = config.loss.reference_kl > 0
    other = config.teacher.model if taught else None
    if other is None:
        return _own_models(policy, config, ranks, taught, referred)
    assert other_teacher is not None, "teacher.model is loaded before"
    check_architecture(other_teacher.config, other.trust_remote_code)
    models = _own_models(policy, config, ranks, False, referred)
    models.teacher = _other(other_teacher, policy, ranks, config)
    return models


def _own_models(
    policy: Policy, config: TrainConfig, ranks: Ranks, taught: bool, referred: bool
) -> Models:
    """The student, and a teacher and a reference of its weights where they are wanted."""
    averaged = config.teacher.sync == "ema"
    if has_adapters(policy.model):
        moves = taught and config.teacher.sync != "frozen"
        if moves:
            add_teacher(policy.model)
        student = _placed_student(policy, ranks, config)
        view: Callable[[Any], AdapterView] = lambda name: AdapterView(student, name)  # noqa: E731
        teacher = view("teacher" if moves else "none") if taught else None
        return Models(student, view("trained"), teacher, view("none") if referred else None)
    # Before the student is sharded: its modules are still plain.
    shapes = [skeleton(policy.model) if wanted else None for wanted in (taught, referred)]
    student = _placed_student(policy, ranks, config)
    low = None if policy.compute_dtype == torch.float32 else policy.compute_dtype
    teacher, reference = (
        shape and _placed(shape, from_module(student), frozen_types(dtype), policy, ranks, config)
        for shape, dtype in zip(shapes, (None if averaged else low, low), strict=True)
    )
    return Models(student, student, teacher, reference)


def _other(model: Any, policy: Policy, ranks: Ranks, config: TrainConfig) -> PackedModel:
    """A teacher of its own weights, which the first rank has read."""
    if not ranks.shards(policy.compute_dtype):  # on its device already
        fuse_layers(model, config.layers, policy.device)
        return PackedModel(model)
    source = from_first_rank(ranks, policy.device)
    return _placed(model, source, frozen_types(policy.compute_dtype), policy, ranks, config)


def _placed_student(policy: Policy, ranks: Ranks, config: TrainConfig) -> PackedModel:
    if not ranks.shards(policy.compute_dtype):  # on its device already
        fuse_layers(policy.model, config.layers, policy.device)
        return PackedModel(policy.model)
    source = from_first_rank(ranks, policy.device)
    offload = config.optim.offload
    return _placed(policy.model, source, trained_types, policy, ranks, config, offload)


def _placed(
    model: Any,
    source: Source,
    stored: Stored,
    policy: Policy,
    ranks: Ranks,
    config: TrainConfig,
    offload: bool = False,
) -> PackedModel:
    fuse_layers(model, config.layers, policy.device)
    packed = PackedModel(model)
    place(packed, source, stored, policy.device, ranks, policy.compute_dtype, offload)
    return packed
