"""What a world did to its base, before any training: study.py writes it as worlds.parquet.

Means over problems of the study, eight samples each at temperature 1. A teacher is the base with a
hint in its prompt; "right" is the type label of the rollout's own annotation, "wrong" another one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.configs import PromptConfig, RoutingConfig, SamplingConfig
from ...schemas.labels import DiagnosticType, Route, TypeLabel, type_label
from ...trace.policy import Policy
from ..bundled.demonstrations import AT_ONCE, NOISE, STUDENT_TEMPLATE, TEACHER_TEMPLATE
from ..bundled.micro import exact_verdicts
from ..samplers.rollouts import rollouts_table
from ..samplers.transformers import TransformersPolicySampler
from .mechanism import PROMPT, Teachers, kl_per_token, other_kind, routed_rollouts

SAMPLES = 8


def base_figures(
    policy: Policy, problems: pa.Table, max_new_tokens: int, seed: int
) -> dict[str, float | None]:
    """Figures of a base by name; null where no rollout has what it is about.

    pass_rate; signal: share of the groups with right and wrong responses; tokens: mean length of a
    response; at_once: share of the responses that answer at once; right_by_columns, right_at_once:
    pass rate of each form.
    right_label_pass_rate, right_label_tokens, right_label_at_once, and the same of wrong_label: of
    the teacher's own samples.
    right_label_key, right_label_error, right_label_elsewhere, and the same of wrong_label: mean
    KL(teacher ‖ base) over the tokens of key spans, of error spans, of all other tokens, in nats.
    """
    plain = _sampled(policy, problems, None, max_new_tokens, seed)
    figures = {"signal": _signal(plain)} | _of_samples(plain)
    for form, chosen in (("at_once", plain["short"]), ("by_columns", ~plain["short"])):
        figures[f"right_{form}"] = _mean(plain["right"][chosen])
    routing = RoutingConfig(alpha=1.0, key=Route.FKL, error=Route.RKL)
    routed = routed_rollouts(policy, problems, routing, max_new_tokens, seed)
    routed = routed.filter(pc.is_valid(routed["diagnostic_type"]))
    if not len(routed):
        return figures
    hinted = {kind: _sampled(policy, problems, kind, max_new_tokens, seed + 1) for kind in NOISE}
    types = [type_label(label) for label in routed["diagnostic_type"].to_pylist()]
    ids = [str(problem_id) for problem_id in routed["problem_id"].to_pylist()]
    for name, labels in (
        ("right_label", types),
        ("wrong_label", [other_kind(list(NOISE), kind) for kind in types]),
    ):
        figures |= {f"{name}_{key}": value for key, value in _told(ids, labels, hinted).items()}
        figures |= {
            f"{name}_{where}": value
            for where, value in _divergences(policy, routed, labels).items()
        }
    return figures


def _sampled(
    policy: Policy,
    problems: pa.Table,
    hint: DiagnosticType | None,
    max_new_tokens: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Arrays, one entry per sample: problem, right, short, tokens."""
    template = (
        STUDENT_TEMPLATE
        if hint is None
        else TEACHER_TEMPLATE.replace("{diagnostic_type}", hint.value)
    )
    sampler = TransformersPolicySampler(policy, batch_tokens=65_536)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    prompt = PromptConfig(student=template)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, prompt, sampling, SAMPLES, seed)
    verdicts = exact_verdicts(problems, rollouts)
    return {
        "problem": np.array(rollouts["problem_id"].to_pylist()),
        "right": np.array(verdicts["correct"].to_pylist(), dtype=float),
        "short": np.array([str(r).startswith(AT_ONCE) for r in rollouts["response"].to_pylist()]),
        "tokens": np.asarray(pc.list_value_length(rollouts["token_ids"]), dtype=float),
    }


def _of_samples(samples: dict[str, np.ndarray]) -> dict[str, float | None]:
    return {
        "pass_rate": _mean(samples["right"]),
        "tokens": _mean(samples["tokens"]),
        "at_once": _mean(samples["short"]),
    }


def _signal(samples: dict[str, np.ndarray]) -> float | None:
    groups = samples["right"].reshape(-1, SAMPLES).mean(1)  # a problem's samples are consecutive
    return _mean((groups > 0) & (groups < 1))


def _told(
    problem_ids: Sequence[str],
    labels: Sequence[TypeLabel],
    hinted: dict[DiagnosticType, dict[str, np.ndarray]],
) -> dict[str, float | None]:
    """The teachers' samples on the problems of labelled rollouts, each under its label."""
    rows = []
    for problem_id, label in zip(problem_ids, labels, strict=True):
        samples = hinted.get(label)  # type: ignore[call-overload] - other labels have none
        if samples is not None:
            own = samples["problem"] == problem_id
            rows.append([samples[name][own].mean() for name in ("right", "tokens", "short")])
    means: list[Any] = np.mean(rows, axis=0).tolist() if rows else [None] * 3
    return dict(zip(("pass_rate", "tokens", "at_once"), means, strict=True))


def _divergences(
    policy: Policy, routed: pa.Table, labels: Sequence[TypeLabel]
) -> dict[str, float | None]:
    """Mean KL(teacher ‖ base), by where the token is."""
    route = [np.array(row, dtype=np.uint8) for row in routed["route"].to_pylist()]
    every = [np.full(len(row), int(Route.FKL)) for row in route]
    offsets = np.append(0, np.cumsum([len(row) for row in route]))
    flat = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(np.concatenate(every), pa.uint8())
    )
    place = routed.column_names.index("route")
    kind = routed.schema.field("route")
    teachers = Teachers(
        policy, routed.set_column(place, kind, flat.cast(kind.type)), PROMPT, list(NOISE)
    )
    taught, own = teachers.logprobs(labels), teachers.student(policy)
    divergence = kl_per_token(taught, own)
    spans = np.concatenate(route)
    return {
        "key": _mean(divergence[spans == int(Route.FKL)]),
        "error": _mean(divergence[spans == int(Route.RKL)]),
        "elsewhere": _mean(divergence[spans == int(Route.GRPO)]),
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
