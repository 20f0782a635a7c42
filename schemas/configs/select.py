"""Config of stage select."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config

Share = Annotated[float, Field(ge=0, le=1)]


class SelectConfig(Config):
    """Stage select: which responses an annotator is asked about, and which groups are trained on.

    A group is a problem's responses; its pass rate is the share of right ones among those with a
    verdict. The criteria apply in the order of the fields.
    """

    verdicts: str = Field(
        default="verdicts", description="Verdicts dataset: alias, id or stage/id."
    )
    mixed: bool = Field(
        default=True, description="Leave out groups whose responses are all right or all wrong."
    )
    pass_rate: tuple[Share, Share] = Field(
        default=(0.0, 1.0), description="Keep groups whose pass rate is within this band."
    )
    keep_truncated: bool = Field(
        default=True, description="Keep responses that hit the token limit."
    )
    min_chars: int | None = Field(
        default=None, ge=0, description="Leave out shorter responses, in characters. null: none."
    )
    max_chars: int | None = Field(
        default=None, ge=1, description="Leave out longer responses, in characters. null: none."
    )
    keep_duplicates: bool = Field(
        default=True,
        description="Keep responses that repeat the text of an earlier one of a group.",
    )
    per_source: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="At most this many groups of a source of problems; below 1: at most this share "
        "of all selected groups. The most informative stay. null: no limit.",
    )
    budget: int | None = Field(
        default=None,
        ge=1,
        description="Select at most this many responses, those of the most informative groups: by "
        "p(1 - p) of the pass rate p, ties by group id. null: no limit.",
    )
    others: Literal["drop", "plain"] = Field(
        default="drop",
        description="Groups without a selected response: drop leaves them out of training, plain "
        "trains them as plain GRPO.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "SelectConfig":
        low, high = self.pass_rate
        if low > high:
            raise ValueError(f"pass_rate: {low:g} is above {high:g}; give [least, most]")
        if self.max_chars is not None and (self.min_chars or 0) > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        return self
