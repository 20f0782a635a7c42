"""Configs of `verify.rewards`: one class per part, chosen by its `name`.

pipelines/verifiers/rewards has one file per class; its `__init__` maps names to files.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, field_validator, model_validator

from ..labels import Order
from ..own_code import is_own, short_name
from .base import Config, operational
from .endpoint import PaidEndpoint
from .own import NAMED, OPTIONS, OWN, SHA256, OwnConfig, OwnName, named_or_own

GROUP = "answer"  # the group of a pattern that has to equal the gold answer


class RewardPart(Config):
    """What all parts share."""

    weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight in the mean of the parts; 0: the value is kept and does not count.",
    )


class AnswerPart(RewardPart):
    name: Literal["answer", "math", "choice"] = Field(
        description="1 if the final answer equals the gold answer: as mathematics, as a choice's "
        "letter, or (answer) as the problem's answer_kind says."
    )


class ExactPart(RewardPart):
    name: Literal["exact"] = Field(
        description="1 if the text equals the gold answer, without outer white space."
    )
    of: Literal["answer", "response"] = Field(
        default="answer", description="Compare the response's final answer, or all of it."
    )
    ignore_case: bool = Field(default=False, description="Whether case does not count.")


class RegexPart(RewardPart):
    name: Literal["regex"] = Field(
        description="1 if the pattern is found in the response, and its group (?P<answer>…), if it "
        "has one, equals the gold answer."
    )
    pattern: str = Field(
        min_length=1, description="Regular expression of RE2, which takes linear time."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return compiled(pattern)


class FormatPart(RewardPart):
    name: Literal["format"] = Field(
        description="The share of the patterns that are found in the response."
    )
    patterns: list[str] = Field(
        default=[r"\\boxed\{"], min_length=1, description="Regular expressions of RE2."
    )

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        return [compiled(pattern) for pattern in patterns]


class LengthPart(RewardPart):
    name: Literal["length"] = Field(
        description="1 up to a length, then falling in a line to 0 over the slack."
    )
    limit: int = Field(ge=1, description="Longest response with the value 1.")
    slack: int = Field(default=0, ge=0, description="Length over which the value falls to 0.")
    unit: Literal["characters", "tokens"] = Field(
        default="characters",
        description="What is counted; a response without token ids has no value in tokens.",
    )


class GymPart(RewardPart):
    name: Literal["gym"] = Field(
        description="reasoning-gym's own score of the final answer, 0 … 1; the problems need "
        "source.scored=true."
    )


class CodePart(RewardPart):
    name: Literal["code"] = Field(
        description="Runs the problem's tests against the response's last code block (Python), "
        "isolated from the network and your files."
    )
    score: Literal["all", "share"] = Field(
        default="all", description="1 if all tests pass, else 0; or the share that passes."
    )
    processes: int = Field(default=16, ge=1, le=1024, description="Most processes and threads.")
    file_mib: int = Field(default=16, ge=1, description="Size limit of a file that it writes.")
    feedback_lines: int = Field(
        default=5, ge=0, le=100, description="Last lines of stderr kept as feedback."
    )
    allow_unisolated: bool = operational(
        False, "Where nothing isolates, run the code with limits of time and memory alone."
    )


class JudgePart(PaidEndpoint, RewardPart):
    role: ClassVar[str] = "judge"

    name: Literal["judge"] = Field(
        description="A model at an endpoint grades the response by a rubric; the value is the mean "
        "grade over the highest one."
    )
    rubric: str | None = Field(
        default=None, description="Rubric file (front matter with version); null: the shipped one."
    )
    highest: int = Field(default=10, ge=1, le=100, description="Grades are 0 … highest.")
    shows: Literal["solution", "answer", "nothing"] = Field(
        default="solution",
        description="What the judge sees besides problem and response: the gold answer with the "
        "solution where there is one, the gold answer alone, or nothing.",
    )
    repeats: int = Field(
        default=1, ge=1, le=100, description="How often each response is graded in each order."
    )
    positions: Literal["fixed", "both"] = Field(
        default="fixed",
        description="fixed: the reference stands before the response; both: it is graded in both "
        "orders.",
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Limit on an answer's tokens.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature of the judge.")
    corrective_turns: int = Field(
        default=1, ge=0, description="Second chances for an invalid answer."
    )

    @property
    def orders(self) -> tuple[Order, ...]:
        return tuple(Order) if self.positions == "both" else (Order.REFERENCE_FIRST,)

    def semantic(self) -> dict[str, Any]:
        """Without the rubric's path: `verifier_identity` has its hash."""
        semantic = super().semantic()
        del semantic["rubric"]
        return semantic

    @model_validator(mode="after")
    def _positions(self) -> "JudgePart":
        if self.positions == "both" and self.shows == "nothing":
            raise ValueError(
                "positions is both and shows is nothing, so there is one text and no order; set "
                "positions=fixed, or show a reference"
            )
        return self


class OwnPart(RewardPart, OwnConfig):
    name: OwnName = Field(description="file.py:function or module:function of your own.")
    options: dict[str, Any] = OPTIONS
    sha256: str | None = SHA256


NamedPart = Annotated[
    AnswerPart | ExactPart | RegexPart | FormatPart | LengthPart | GymPart | CodePart | JudgePart,
    Field(discriminator="name"),
]
Part = Annotated[
    Annotated[NamedPart, Tag(NAMED)] | Annotated[OwnPart, Tag(OWN)], named_or_own("name")
]


def compiled(pattern: str) -> str:
    """The pattern. Raises ValueError if RE2 can't compile it."""
    import pyarrow as pa  # a config without patterns needs no Arrow
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern)
        if f"(?P<{GROUP}>" in pattern:
            pc.extract_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        reason = str(error).removeprefix("Invalid regular expression: ")
        raise ValueError(
            f"is no regular expression of RE2 ({reason}); it has no lookaround and no "
            "backreference, and in a pattern with a named group write (?:…) for the other groups"
        ) from None
    return pattern


def part_labels(parts: list[Any]) -> list[str]:
    """A name for each part in table verdicts, distinct: a second regex is `regex 2`. Functions of
    one's own are `file:function`.
    """
    labels: list[str] = []
    for part in parts:
        name = short_name(part.name) if is_own(part.name) else part.name
        count = sum(label == name or label.startswith(f"{name} ") for label in labels)
        labels.append(f"{name} {count + 1}" if count else name)
    return labels


def deciding(parts: list[Any], chosen: str | int) -> int:
    """The index of the part that decides `correct`. Raises ValueError if there is none."""
    labels = part_labels(parts)
    if isinstance(chosen, int):
        if 0 <= chosen < len(parts):
            return chosen
    elif chosen in labels:
        return labels.index(chosen)
    raise ValueError(
        f"correct_by is {chosen!r}; name one of the parts {', '.join(labels)}, or an index "
        f"0 … {len(parts) - 1}"
    )
