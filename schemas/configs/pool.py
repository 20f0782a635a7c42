"""Config of the pool that online steps draw their problems from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config

Difficulty = Annotated[float, Field(ge=0)]


class PoolBand(Config):
    """A band of difficulty and the step from which it holds."""

    from_step: int = Field(
        default=0, ge=0, description="First step of the band, offline steps counted."
    )
    band: tuple[Difficulty, Difficulty] = Field(
        description="Least and most pass rate, or level, of its problems."
    )


class PoolConfig(Config):
    """Problems of online steps by difficulty, in bands that may change over the steps.

    What a step draws depends on the seed, the step and the difficulties alone.
    """

    rates: str | None = Field(
        default=None,
        description="Dataset whose pass rates are the difficulties: verdicts, a selection or "
        "evaluations (of the trained policy if it has one); alias, id or stage/id. null: the first "
        "number of the problems' column level.",
    )
    bands: list[PoolBand] = Field(
        default=[PoolBand(band=(0.2, 0.8))],
        min_length=1,
        description="Bands of pass rate or level; each holds from its from_step on, the first from "
        "step 0.",
    )
    unmeasured: Literal["keep", "leave_out"] = Field(
        default="keep",
        description="Problems without a pass rate or level: in all bands or in none.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        steps = [one.from_step for one in self.bands]
        if steps[0] != 0 or sorted(set(steps)) != steps:
            raise ValueError(
                f"bands: from_step is {', '.join(map(str, steps))}; begin at 0 and ascend"
            )
        for number, one in enumerate(self.bands):
            low, high = one.band
            if low > high:
                raise ValueError(f"bands: band {number} is [{low:g}, {high:g}]; give [least, most]")
            if self.rates is not None and high > 1:
                raise ValueError(f"bands: band {number} ends at {high:g}; pass rates are 0 to 1")
        return self
