"""Optional inputs and settings of the loss for the twin's cases, chosen at random."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.labels import Route, Signal
from trace_opd.tests.trace.twin import Case, shaped_log_softmax
from trace_opd.trace.gates import Limits
from trace_opd.trace.losses import Scores

SHAPES = ("above", "below", "rising", "falling", "signed")


def with_options(
    case: Case,
    seed: int = 0,
    contrast: bool = True,
    teacher_temperature: float | None = None,
    limits: Limits | None = None,
    scores: int | None = None,
) -> Case:
    """The case with every optional input; scores: the number k of a teacher's tokens."""
    generator, x = torch.Generator().manual_seed(seed), case.inputs
    tokens = len(x.route)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = replace(
        x,
        contrast_logprobs=-normal(tokens).abs() if contrast else None,
        position=torch.rand(tokens, generator=generator, dtype=torch.float64),
        kl_scale=normal(tokens),
        sequence=torch.arange(tokens) // 3,
        scores=None if scores is None else scores_of(case, scores),
    )
    return replace(case, inputs=inputs, teacher_temperature=teacher_temperature, limits=limits)


def scores_of(case: Case, k: int) -> Scores:
    """The teacher's k likeliest tokens; the last entry of every second token is left out."""
    routed = case.inputs.route != 0
    log_q = shaped_log_softmax(
        case.teacher_hidden, case.teacher_head, case.inputs.temperature[routed]
    ).detach()
    logprobs, token_ids = log_q.topk(min(k, log_q.shape[-1]), -1)
    if logprobs.shape[-1] > 1:
        logprobs[::2, -1], token_ids[::2, -1] = -torch.inf, 0
    kept = torch.zeros_like(log_q).scatter_add_(1, token_ids, logprobs.exp())
    tail = (log_q.exp() - kept).clamp(min=0).sum(-1)
    tail = torch.where(tail > 1e-12, tail, 0.0).log()
    sampled = log_q.gather(1, case.inputs.token_ids[routed, None]).squeeze(1)
    return Scores(token_ids, logprobs, tail, sampled)


def drawn_gate(at: random.Random, signals: list[Signal]) -> GateConfig:
    """Any gate of the signals; half of them take their place from the step before."""
    shape = at.choice(SHAPES)
    known = at.random() < 0.5
    return GateConfig(
        of=at.choice(signals),
        shape=shape,
        at=at.uniform(0, 1.5) if known else None,
        quantile=None if known else 0.5,
        scale=1.0 if shape in ("above", "below") else at.uniform(0.1, 2),
        floor=0.0 if shape == "signed" else at.choice([0.0, 0.3, -1.0]),
    )


def drawn_options(
    at: random.Random, routes: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of LossConfig besides those of old, and arguments of `with_options`.

    One case in three has scores, without the routes that they can't teach; one in four, `top_k`.
    """
    signals = list(Signal)
    if Route.REWEIGHT in routes:
        signals = [Signal.TEACHER_ENTROPY, Signal.STUDENT_ENTROPY, Signal.POSITION]
    gates = [drawn_gate(at, signals) for _ in range(at.choice([0, 1, 1, 2]))]
    reweight = at.choice(["ratio", "inverse", "bounded", "one_sided"])
    loss: dict[str, Any] = {
        "gates": gates,
        "importance_clip": at.choice([None, 1.1]),
        "reweight": reweight,
        "policy": at.choice(["grpo", "gspo", "cispo", "sapo"]),
    }
    if reweight == "bounded":
        loss["reweight_scale"] = at.uniform(0.05, 1)
    if reweight in ("bounded", "one_sided"):
        loss["reweight_threshold"] = at.choice([0.0, 0.05])
    options: dict[str, Any] = {
        "contrast": at.random() < 0.5,
        "teacher_temperature": at.choice([None, 1.0, 0.8]),
        "limits": None,
        "scores": None,
    }
    if at.random() < 0.8:
        thresholds = tuple(None if gate.at is not None else at.uniform(0, 1.5) for gate in gates)
        options["limits"] = Limits(thresholds, at.uniform(0.5, 2), at.uniform(0.1, 1))
    if not {Route.RKL, Route.JSD} & set(routes) and at.random() < 0.7:
        options["scores"] = at.randint(1, 8)
    elif at.random() < 0.4:
        loss["top_k"] = at.randint(1, 8)
    return loss, options


def valid(loss: dict[str, Any]) -> LossConfig:
    """The config, with settings that exclude each other left at their defaults."""
    if loss.get("policy", "grpo") != "grpo":
        loss = loss | {"truncated_importance": None, "grpo": True}
    return LossConfig(**loss)
