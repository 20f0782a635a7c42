"""The first steps that a study analyses: of `mechanism`, and of each claim's one_step arm."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import polars as pl

from ...data.store import Dataset, Store
from ...schemas.configs import StudyConfig, TrainConfig
from .arms import Run
from .measured import Call, measured
from .mechanism import first_step, has_key_tokens, one_step

_COLUMNS = {"ablation": pl.String, "point": pl.String, "method": pl.String}
_COLUMNS |= {"kl_clip": pl.String, "objective": pl.String, "seed": pl.Int64}
_COLUMNS |= {"key_tokens": pl.Int64, "supported_tokens": pl.Int64}
_COLUMNS |= dict.fromkeys(("kl_clipped", "lift", "to_right", "to_wrong"), pl.Float64)


def first_steps(
    config: StudyConfig, runs: Sequence[Run], made: Sequence[Dataset], store: Store, pool: Executor
) -> pl.DataFrame | None:
    """A row per analysed run and objective; None if the study analyses none. kl_clip: the run's.

    A claim's run whose first step has no key token has no row: a weak base has such steps.

    Raises:
        InputError: a run of `mechanism` has no key token, or no online steps.
    """
    named = {(name, claim.one_step) for name, claim in config.claims.items() if claim.one_step}
    if config.mechanism is not None:
        named.add((next(iter(config.ablations)), config.mechanism))
    if not named:
        return None
    chosen = {
        place: Call(_rows, (run.key, dataset.ref, int(run.arm.ablation in config.claims)))
        for place, (run, dataset) in enumerate(zip(runs, made, strict=True))
        if (run.arm.ablation, run.arm.name) in named
    }
    rows = []
    for place, own in measured(chosen, store, pool, "first steps").items():
        arm = runs[place].arm
        of = {"ablation": arm.ablation, "point": arm.point, "method": arm.name}
        of["kl_clip"] = arm.train.loss.kl_clip
        rows += [of | row for row in own]
    return pl.DataFrame(rows, schema=_COLUMNS)


def _rows(root: str, config: str, ref: str, may_lack: int) -> list[dict[str, Any]]:
    """may_lack: 1 if a first step without key tokens is no error."""
    routed = first_step(Store(root).get(ref))
    if may_lack and not has_key_tokens(routed):
        return []
    return one_step(TrainConfig.model_validate_json(config), routed)
