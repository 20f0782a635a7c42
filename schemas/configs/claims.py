"""Config of a study's claims: arms compared at each point of a map of worlds.

A study (study.py) has claims next to its ablations. pipelines/study/claims.py makes their arms.
"""

from itertools import product

from pydantic import Field, model_validator

from .base import Config
from .world import WorldConfig

PASS_RATE, TOKENS, ENTROPY, LIFT = "pass_rate", "tokens", "entropy", "lift"
MEASURES = (PASS_RATE, TOKENS, ENTROPY, LIFT)
GRPO = "grpo"  # the arm whose lift the one_step arm's is compared with
_TAKEN = "|;\n"  # they part cells of tables, and names in lists


class AxisConfig(Config):
    """What changes along an axis of a claim's map."""

    label: str = Field(description="What changes, for the page.")
    points: dict[str, list[str]] = Field(
        description="key=value overrides by the point's name, each of `world.` or of `train.`."
    )

    @model_validator(mode="after")
    def _each_begins(self) -> "AxisConfig":
        if not self.points:
            raise ValueError("points is empty; give at least one, as {name: [world.edge=0.5]}")
        for name, overrides in self.points.items():
            if any(character in name for character in _TAKEN):
                raise ValueError(f"point {name!r} has a |, a ; or a line break; name it without")
            for text in overrides:
                if not text.startswith(("world.", "train.")):
                    raise ValueError(
                        f"override {text!r} of point {name!r} begins neither with world. nor with "
                        "train.; say which of the two it changes"
                    )
        return self


class ClaimArmConfig(Config):
    """An arm of a claim: its changes to the study's `train`."""

    preset: str | None = Field(
        default=None, description="TRACE or a baseline by name (`trace-opd presets`)."
    )
    set: list[str] = Field(default=[], description="key=value overrides of `train`.")


class ComparisonConfig(Config):
    """A paired difference of two arms at each point, `higher` minus `lower`."""

    higher: str = Field(description="Arm that the claim expects to have more.")
    lower: str = Field(description="Arm that it expects to have less.")
    of: str = Field(
        default=PASS_RATE,
        description="What is compared after the last step: pass_rate (of the main split), tokens, "
        "entropy, a split's name (its pass rate), or lift (of the first step; needs one_step).",
    )

    @model_validator(mode="after")
    def _of_two(self) -> "ComparisonConfig":
        if self.higher == self.lower:
            raise ValueError(f"higher and lower are both {self.higher!r}; name two arms")
        return self


class ClaimConfig(Config):
    """A statement about arms, tested at each point of a map of worlds."""

    title: str = Field(description="The claim in a line, the heading of its section.")
    about: str = Field(default="", description="Markdown for the top of its section.")
    world: WorldConfig = Field(default=WorldConfig(), description="Dials at every point.")
    x: AxisConfig = Field(description="The map's first axis.")
    y: AxisConfig | None = Field(default=None, description="Its second axis; null: it has one.")
    arms: dict[str, ClaimArmConfig] = Field(min_length=1, description="Arms by name.")
    comparisons: list[ComparisonConfig] = Field(
        min_length=1, description="Differences of arms; the first decides the verdict."
    )
    one_step: str | None = Field(
        default=None, description="Arm whose first step is analysed at each point."
    )
    seeds: int | None = Field(
        default=None, ge=1, description="Number of the study's seeds that it takes; null: all."
    )

    @property
    def grid(self) -> list[tuple[str, str | None]]:
        """The names of x and y of all points, x by x."""
        return list(product(self.x.points, self.y.points if self.y is not None else [None]))

    @model_validator(mode="after")
    def _consistent(self) -> "ClaimConfig":
        for comparison in self.comparisons:
            for arm in (comparison.higher, comparison.lower):
                if arm not in self.arms:
                    raise ValueError(f"comparisons: arm {arm!r} is none of {list(self.arms)}")
            if comparison.of == LIFT:
                self._has_lift(comparison)
        if self.one_step is not None and self.one_step not in self.arms:
            raise ValueError(f"one_step {self.one_step!r} is none of {list(self.arms)}")
        names = [point_name(x, y) for x, y in self.grid]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two points are named {twice[0]!r}; rename one of them")
        return self

    def _has_lift(self, comparison: ComparisonConfig) -> None:
        if self.one_step is None:
            raise ValueError("comparisons: of lift needs one_step; name the arm to analyse there")
        if {comparison.higher, comparison.lower} != {GRPO, self.one_step}:
            raise ValueError(
                f"comparisons: of lift compares {GRPO} with one_step ({self.one_step}), not "
                f"{comparison.higher} with {comparison.lower}; name these two"
            )


def point_name(x: str, y: str | None) -> str:
    """A point's name in tables and pictures."""
    return x if y is None else f"{x}, {y}"
