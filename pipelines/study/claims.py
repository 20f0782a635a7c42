"""The points of a study's claims: each one's world and overrides of training. arms.py trains there.

At a point the config of training is the study's `train`, over it the base of the point's world, the
arm's preset, its overrides, and those of the point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...schemas.configs import ClaimArmConfig, ClaimConfig, StudyConfig, TrainConfig, WorldConfig
from ...schemas.configs.claims import point_name
from ...schemas.presets import preset_data
from ...schemas.settings import overlaid, validated

_WORLD, _TRAIN = "world.", "train."


@dataclass(frozen=True)
class Point:
    """A point of a claim's map. name: in tables and pictures; train: overrides of training."""

    claim: str
    name: str
    world: WorldConfig
    train: Sequence[str]


def points_of(name: str, claim: ClaimConfig) -> list[Point]:
    """All points of a claim, x by x.

    Raises:
        InputError: a bad override of a world.
    """
    found = []
    for x, y in claim.grid:
        overrides = [*claim.x.points[x], *(claim.y.points[y] if claim.y and y is not None else [])]
        point = point_name(x, y)
        world = validated(
            WorldConfig,
            claim.world.model_dump(mode="json"),
            _without(_WORLD, overrides),
            _where(name, point),
        )
        found.append(Point(name, point, world, _without(_TRAIN, overrides)))
    return found


def all_points(config: StudyConfig) -> list[Point]:
    """The points of all claims."""
    return [point for name, claim in config.claims.items() for point in points_of(name, claim)]


def arm_at(config: StudyConfig, point: Point, base: str, arm: ClaimArmConfig) -> TrainConfig:
    """The training of an arm at a point, without its problems. base: of the point's world.

    Raises:
        InputError: an unknown preset, a bad override.
    """
    laid = preset_data(arm.preset, TrainConfig) if arm.preset else {}
    train = overlaid(overlaid(config.train, {"policy": {"path": base}}, []), laid, [])
    return validated(
        TrainConfig,
        train.model_dump(mode="json"),
        [*arm.set, *point.train],
        _where(point.claim, point.name),
    )


def _without(prefix: str, overrides: Sequence[str]) -> list[str]:
    return [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]


def _where(claim: str, point: str) -> str:
    return f"claims.{claim}, point {point!r}"
