"""The bases of a study's worlds: pre-trained once per machine, and measured for the page."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path

import polars as pl

from ...data.store import Store
from ...schemas.configs import StudyConfig, WorldConfig
from ...trace.policy import load_policy
from ..bundled.prepared import is_made
from ..bundled.world import base_folder, base_of
from ..progress import progress_bar
from .arms import Arm
from .base_figures import base_figures
from .measured import Call, measured
from .problem_sets import ProblemSets

PROBLEMS = 32  # on which a base is measured
_APART = "; "  # between the names of worlds that share a row


def world_bases(worlds: Iterable[WorldConfig], pool: Executor) -> dict[WorldConfig, str]:
    """The folder of each world's base; pre-trains those that are not there.

    Raises:
        InputError: see `base_of`.
    """
    # Worlds that differ in what is asked alone share a base, and no process waits for another.
    trained = {world: world.model_copy(update={"asked_digits": None}) for world in worlds}
    folders = {world: base_folder(world) for world in dict.fromkeys(trained.values())}
    futures = [
        pool.submit(_base, world) for world, folder in folders.items() if not is_made(folder)
    ]
    with progress_bar("bases", len(futures), "bases") as progress:
        for future in as_completed(futures):
            future.result()
            progress.advance(1)
    return {world: str(folders[own]) for world, own in trained.items()}


def _base(world: WorldConfig) -> None:
    base_of(world)


def point_world(claim: str, point: str) -> str:
    """The name of a point's world in the table of bases."""
    return f"{claim}: {point}"


def worlds_table(
    config: StudyConfig,
    all_arms: Sequence[Arm],
    bases: Mapping[WorldConfig, str],
    sets: Mapping[int | None, ProblemSets],
    store: Store,
    pool: Executor,
) -> pl.DataFrame | None:
    """A row per base: what its worlds did to it, before any training; None without worlds.

    world: names of the worlds that share the row, those of `worlds` and of the claims' points;
    base: the name of its folder. The rest is base_figures.py's.
    """
    limit = config.train.online.sampling.max_new_tokens
    named = {name: (world, limit) for name, world in config.worlds.items()}
    for arm in all_arms:
        if arm.point and arm.world is not None:
            limit = arm.train.online.sampling.max_new_tokens
            named.setdefault(point_world(arm.ablation, arm.point), (arm.world, limit))
    calls = {
        name: Call(_figures, (bases[w], sets[w.asked_digits].problems, tokens, w.seed))
        for name, (w, tokens) in named.items()
    }
    figures = measured(calls, store, pool, "measured bases")
    names: dict[Call, list[str]] = {}
    for name, call in calls.items():
        names.setdefault(call, []).append(name)
    rows = [
        {"world": _APART.join(own), "base": Path(str(call.arguments[0])).name} | figures[own[0]]
        for call, own in names.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else None


def by_world(worlds: pl.DataFrame) -> dict[str, dict[str, float | None]]:
    """Each world's row of the table, by its name."""
    return {name: row for row in worlds.to_dicts() for name in row["world"].split(_APART)}


def _figures(
    root: str, base: str, problems: str, max_new_tokens: int, seed: int
) -> dict[str, float | None]:
    asked = Store(root).get(problems).read().slice(0, PROBLEMS)
    return base_figures(load_policy(base), asked, max_new_tokens, seed)
