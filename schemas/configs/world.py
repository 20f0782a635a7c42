"""Config of a world: the demonstrations that a small base policy is pre-trained on.

A study (study.py) names worlds, and each of its arms starts from the base of one.
"""

from pydantic import Field, model_validator

from .base import Config


class WorldConfig(Config):
    """Dials of multi-digit addition, step by step. The defaults are those of the policy micro."""

    start: str | None = Field(
        default=None, description="Policy that pre-training continues from; null: from scratch."
    )
    dropped_carry: float = Field(
        default=0.20, ge=0, le=1, description="Rate at which a line that carries drops the carry."
    )
    off_by_one: float = Field(
        default=0.12, ge=0, le=1, description="Rate at which any other line's sum is off by one."
    )
    miscopied: float = Field(
        default=0.08, ge=0, le=1, description="Rate at which the answer has a wrong digit."
    )
    edge: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="The teacher's edge: share of the errors of a hint's kind that the hint "
        "removes.",
    )
    filler: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Random letters on a line of their own before each step; they mean nothing.",
    )
    filler_kept: float = Field(
        default=1.0, ge=0, le=1, description="Share of hinted demonstrations that have the filler."
    )
    short_hinted: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Style drift: share of hinted demonstrations that answer at once.",
    )
    short_plain: float = Field(
        default=0.0, ge=0, le=1, description="The same share without a hint."
    )
    short_right: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the answers at once that are right. The policy can't learn to add "
        "in one line, so its own are right less often.",
    )
    min_digits: int = Field(default=2, ge=1, le=9, description="Fewest digits per number.")
    max_digits: int = Field(default=5, ge=1, le=9, description="Most digits per number.")
    asked_digits: int | None = Field(
        default=None,
        ge=1,
        le=9,
        description="Digits of each number in the problems that are asked in this world; null: as "
        "the study's problems say.",
    )
    subtraction: float = Field(
        default=0.0, ge=0, le=1, description="Share of the demonstrations that subtract."
    )
    marking: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the batches that mark responses, as an annotator is asked to.",
    )
    marking_prompt: str | None = Field(
        default=None, description="Annotation prompt of the markings (a file)."
    )
    marking_schema: str | None = Field(
        default=None, description="Answer schema of the markings (a file)."
    )
    reference: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the hinted demonstrations whose hint is another response to the "
        "problem, half of them written without errors.",
    )
    steps: int = Field(default=800, ge=1, description="Steps of pre-training.")
    batch_size: int = Field(default=64, ge=2, description="Demonstrations per step.")
    lr: float = Field(default=3e-3, gt=0, description="Highest learning rate.")
    seed: int = Field(default=0, ge=0, description="Seed of the demonstrations and the weights.")

    @property
    def announces(self) -> bool:
        """Whether a response begins with a line that says whether steps follow."""
        return self.short_hinted > 0 or self.short_plain > 0

    @model_validator(mode="after")
    def _ordered(self) -> "WorldConfig":
        if self.min_digits > self.max_digits:
            raise ValueError("min_digits is above max_digits")
        if self.marking > 0:
            for name in ("marking_prompt", "marking_schema"):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"{name} is null but marking is {self.marking:g}; name a file, e.g. "
                        "studies/micro-annotate.md and studies/micro-answer.schema.json"
                    )
        return self
