"""What a run needs to train from scores in a teacher's place, checked before a model is loaded.

Stage train calls `check_scores_fit` when it begins. The rows are checked when the offline source is
opened (offline.py).
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.configs import PromptConfig, TeacherConfig, TrainConfig
from ...schemas.conversation import COLUMN, HISTORY
from ...schemas.errors import InputError
from ...schemas.labels import Route
from ...trace.schedule import kl_weight

_CONTEXTS = ("rollout_id", "problem", "diagnostic_type", "teacher_context", "route")
_PLAIN = TeacherConfig()


def check_scores_fit(config: TrainConfig, routed: Dataset, scores: Dataset) -> None:
    """Raises InputError with the first reason why a run cannot train from the scores."""
    _check_settings(config)
    _check_made_alike(config, routed, scores)
    for part in range(routed.parts):
        _check_routes(routed, part)
    theirs = scores.manifest["inputs"].get("routed")
    if theirs not in (None, routed.ref):
        _check_contexts(routed, scores.input("routed"), scores)


def _check_settings(config: TrainConfig) -> None:
    """Raises InputError for a setting that would have no effect, or that scores cannot serve."""
    teacher = config.teacher
    if not config.schedule.w0:
        raise InputError(
            "teacher.scores: λ is 0 in every step (schedule.w0=0), so no score would be read; set "
            "schedule.w0, or leave teacher.scores out"
        )
    for name in ("sync", "sync_steps", "ema_rate", "model", "temperature"):
        value = getattr(teacher, name)
        if value != getattr(_PLAIN, name) and (name, value) != ("sync", "frozen"):
            how = " (score.temperature sets it)" if name == "temperature" else ""
            raise InputError(
                f"teacher.{name}: has no effect with teacher.scores, which were made by a teacher "
                f"that does not change{how}; leave one of the two out"
            )
    last = config.offline.steps + config.online.steps
    taught = [s for s in range(config.offline.steps, last) if kl_weight(s, config.schedule) > 0]
    if taught:
        raise InputError(
            "teacher.scores: hold the rollouts of the routed dataset alone, and online step "
            f"{taught[0]} has λ = {kl_weight(taught[0], config.schedule):.3g} > 0; let λ reach 0 "
            f"in the {config.offline.steps} offline steps (schedule.hold_steps, decay_steps), or "
            "train the online steps in a run of their own"
        )


def _check_made_alike(config: TrainConfig, routed: Dataset, scores: Dataset) -> None:
    """Raises InputError for scores of other rollouts, or under other prompts."""
    inputs = scores.manifest["inputs"]
    if "routed" in inputs and inputs["routed"] != routed.ref:
        own, theirs = (one.manifest["inputs"] for one in (routed, scores.input("routed")))
        if own.get("rollouts") != theirs.get("rollouts"):
            raise InputError(
                f"dataset {scores.ref}: scores rollouts {theirs.get('rollouts')}, and "
                f"{routed.ref} routes {own.get('rollouts')}; score the routed dataset"
            )
    if scores.parts != routed.parts:
        raise InputError(
            f"dataset {scores.ref} has {scores.parts} parts, {routed.ref} has {routed.parts}; "
            "score the routed dataset"
        )
    made: Any = scores.manifest["config"].get("prompt")
    if made is not None and PromptConfig.model_validate(made) != config.prompt:
        raise InputError(
            f"dataset {scores.ref}: its teacher's prompts were made by other templates than this "
            "run's prompt; score again with the same prompt section, or train with that of score"
        )


def _check_routes(routed: Dataset, part: int) -> None:
    """Raises InputError for routes and contrasts that scores cannot serve."""
    codes = pc.list_flatten(routed.read_part(part, ["route"])["route"]).to_numpy()
    for route in (Route.RKL, Route.JSD):
        if np.any(codes == int(route)):
            raise InputError(
                f"dataset {routed.ref}: routes tokens to {route.label}, which needs the teacher's "
                "probability of every token that the student finds likely, and scores have only "
                "those that the teacher does: a truncated KL is no KL (verl#7856); route to fkl, "
                "or train with a teacher instead of teacher.scores"
            )
    if (routed.manifest["config"].get("routing") or {}).get("contrast_context") is not None:
        raise InputError(
            f"dataset {routed.ref}: has a contrast context, under which the scores have no "
            "log-probabilities; train with a teacher instead of teacher.scores"
        )


def _check_contexts(routed: Dataset, scored: Dataset, scores: Dataset) -> None:
    """Raises InputError unless the teacher of a scored row saw what this run's would see."""
    for part in range(routed.parts):
        own, theirs = (_contexts(one, part) for one in (routed, scored))
        saw = {row.pop("rollout_id"): row for row in theirs.to_pylist()}
        for row in own.to_pylist():
            if not any(row["route"]):
                continue
            other = saw.get(row["rollout_id"])
            names = ("problem", COLUMN, "teacher_context")
            names += () if row["teacher_context"] is not None else ("diagnostic_type",)
            for name in names:
                if other is not None and other[name] != row[name]:
                    raise InputError(
                        f"dataset {scores.ref}, rollout {row['rollout_id']}: its teacher saw "
                        f"another {name} than {routed.ref} gives it; score the routed dataset"
                    )


def _contexts(routed: Dataset, part: int) -> pa.Table:
    """What the teacher of each row sees; the history is null in tables without it."""
    table = routed.read_part(part, [*_CONTEXTS, COLUMN])
    if COLUMN not in table.column_names:
        table = table.append_column(HISTORY, pa.nulls(len(table), HISTORY.type))
    return table
