"""The arms of a study, the configs of their runs, and what tuning chose.

study.py calls these functions. Without bases and problem sets `arms` gives configs that cannot run
yet: they check a study before any work, and count its runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import polars as pl

from ...schemas.configs import StudyConfig, TrainConfig, WorldConfig
from ...schemas.errors import InputError
from ...schemas.labels import Route
from ...schemas.presets import preset_data
from ...schemas.settings import overlaid, override
from .claims import all_points, arm_at
from .figures import tuning_rate
from .problem_sets import ProblemSets, sources


@dataclass(frozen=True)
class Arm:
    """A row of an ablation's table or a column of a claim's, and its training.

    ablation: or claim; point: of a claim's map, "" in ablations; tuned: arm of the first ablation
    whose tuned choice it takes; world: whose base it starts from, None: train.policy.path.
    """

    ablation: str
    name: str
    train: TrainConfig
    seeds: Sequence[int] = ()
    point: str = ""
    tuned: str | None = None
    world: WorldConfig | None = None


@dataclass(frozen=True)
class Run:
    """An arm with a seed; choice: overrides that tuning chose."""

    arm: Arm
    seed: int
    choice: tuple[str, ...] = ()

    @property
    def train(self) -> TrainConfig:
        return override(self.arm.train, [*self.choice, f"seed={self.seed}"])

    @property
    def key(self) -> str:
        """Equal for runs of different tables with the same training."""
        return self.train.model_dump_json()


def worlds_of(config: StudyConfig) -> list[WorldConfig]:
    """All distinct worlds of a study."""
    points = (point.world for point in all_points(config))
    return list(dict.fromkeys([*config.worlds.values(), *points]))


def asked_of(config: StudyConfig) -> list[int | None]:
    """All numbers of digits that its worlds ask; None: as the study's problems say."""
    return list(dict.fromkeys([None, *(world.asked_digits for world in worlds_of(config))]))


def arms(
    config: StudyConfig,
    bases: Mapping[WorldConfig, str] | None = None,
    sets: Mapping[int | None, ProblemSets] | None = None,
    tuning: bool = False,
) -> list[Arm]:
    """All arms.

    bases: folders of the worlds' bases; sets: of all numbers of digits that are asked; None: none
    are made yet. tuning: evaluate the problems that tune, not the splits.

    Raises:
        InputError: an unknown preset, a bad override, a source that cannot ask a world's digits.
    """
    bases = unmade_bases(config) if bases is None else bases
    sets = _unmade_sets(config) if sets is None else sets
    found = []
    for ablation, rows in config.ablations.items():
        first = ablation == next(iter(config.ablations))
        seeds = config.seeds if first else config.seeds[: config.ablation_seeds]
        for name, arm in rows.items():
            world = None if arm.world is None else config.worlds[arm.world]
            laid = preset_data(arm.preset, TrainConfig) if arm.preset else {}
            train = overlaid(config.train, laid, arm.set)
            if world is not None:
                train = overlaid(train, {"policy": {"path": bases[world]}}, [])
            train = _asked(train, sets, world, tuning)
            tuned = name if first else arm.like
            found.append(Arm(ablation, name, train, seeds, tuned=tuned, world=world))
    for point in all_points(config):
        claim = config.claims[point.claim]
        seeds = config.seeds[: claim.seeds]
        for name, arm in claim.arms.items():
            train = arm_at(config, point, bases[point.world], arm)
            train = _asked(train, sets, point.world, tuning)
            if name == claim.one_step and Route.FKL not in _actions(train):
                raise InputError(
                    f"claims.{point.claim}.one_step: arm {name!r} routes no token to fkl at "
                    f"{point.name}, and the first step is analysed there; name another arm"
                )
            found.append(Arm(point.claim, name, train, seeds, point.name, world=point.world))
    return found


def _actions(train: TrainConfig) -> tuple[Route, Route]:
    return train.online.routing.key, train.online.routing.error


def _asked(
    train: TrainConfig,
    sets: Mapping[int | None, ProblemSets],
    world: WorldConfig | None,
    tuning: bool,
) -> TrainConfig:
    """A training with the problems that are asked in a world."""
    asked = sets[None if world is None else world.asked_digits]
    evaluated = asked.tuning if tuning else asked.splits
    links = {"online": {"problems": asked.problems}, "validation": {"problems": evaluated}}
    return overlaid(train, links, [])


def unmade_bases(config: StudyConfig) -> dict[WorldConfig, str]:
    """Names for bases that are not there yet; worlds that share a base share the name."""
    return {
        world: world.model_copy(update={"asked_digits": None}).model_dump_json()
        for world in worlds_of(config)
    }


def _unmade_sets(config: StudyConfig) -> dict[int | None, ProblemSets]:
    found = {}
    for digits in asked_of(config):
        roles = sources(config, digits)
        name = "" if digits is None else f"{digits}-digits"
        tuning = {"tuning": name} if "tuning" in roles else {}
        found[digits] = ProblemSets(name, tuning, dict.fromkeys(config.splits, name))
    return found


def tuning_runs(config: StudyConfig, all_arms: Sequence[Arm]) -> list[Run]:
    """Every arm of the first ablation with every choice; none without tuning."""
    if config.tuning is None:
        return []
    first = next(iter(config.ablations))
    return [
        Run(arm, config.tuning.seed, tuple(choice))
        for arm in all_arms
        if arm.ablation == first
        for choice in config.tuning.choices
    ]


def chosen(tries: Sequence[Run], table: pl.DataFrame) -> dict[str, tuple[str, ...]]:
    """The choice of each arm with the best sampled pass rate, mean over evaluations; the first of
    equals.

    table: the results of these runs.
    """
    choices: dict[str, list[tuple[str, ...]]] = {}
    for run in tries:
        choices.setdefault(run.arm.name, []).append(run.choice)

    def rate(name: str, choice: tuple[str, ...]) -> float:
        found = tuning_rate(table, name, " ".join(choice))
        return -1.0 if found is None else found

    return {name: max(own, key=partial(rate, name)) for name, own in choices.items()}


def study_runs(all_arms: Sequence[Arm], choices: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """Every arm with its seeds and its choice."""
    return [
        Run(arm, seed, choices.get(arm.tuned or "", ())) for arm in all_arms for seed in arm.seeds
    ]
