"""Config of stage problems and its sources."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ..labels import AnswerKind, Operation
from .base import Config, added
from .own import NAMED, OWN, OwnSource, named_or_own
from .rollout import template_fields


class Columns(Config):
    """Names of the columns in a foreign table; those not named are recognised by their names.

    A dot leads into a nested column: reward_model.ground_truth. An empty name means none.
    """

    problem: str | None = Field(default=None, description="Column of the problem text.")
    answer: str | None = Field(default=None, description="Column of the gold answer.")
    solution: str | None = Field(default=None, description="Column of the reference solution.")
    choices: Annotated[list[str], Field(max_length=25)] | str | None = Field(
        default=None,
        description="Columns of wrong choices, among which the answer is shuffled; or the column "
        "of a list of all choices.",
    )
    id: str | None = Field(default=None, description="Column of the row's own id.")
    subject: str | None = Field(default=None, description="Column of the subject.")
    level: str | None = Field(default=None, description="Column of the difficulty.")
    tests: str | None = added(
        None,
        "Column of a program's tests, for the reward code: source that defines check(candidate), "
        "or asserts.",
    )
    entry_point: str | None = added(None, "Column of the name of the function that tests call.")
    cases: str | None = added(
        None,
        "Column of a program's cases, for the reward code: a list of {stdin, stdout}, or "
        "{inputs, outputs} of lists, also as JSON text.",
    )
    metadata: str | None = added(
        None, "Column of a mapping, also as JSON text, that rewards of your own see."
    )

    template: str | None = added(
        None,
        "Text of the problem with columns in braces, instead of one column: "
        '"{question}\\n\\n{context}".',
    )
    answer_template: str | None = added(
        None, "Text of the gold answer with columns in braces, instead of one column."
    )
    messages: str | None = added(
        None,
        "Column of conversations, instead of one of problems: a list of {role, content}, also as "
        "JSON text. The user's last turn is the problem, the turns before it are its history.",
    )

    @model_validator(mode="after")
    def _one_kind_of_problem(self) -> "Columns":
        for name in ("problem", "template"):
            if self.messages and getattr(self, name):
                raise ValueError(f"messages and {name} are both given; a problem has one of them")
        return self

    @model_validator(mode="after")
    def _one_kind_of_tests(self) -> "Columns":
        if self.tests and self.cases:
            raise ValueError("tests and cases are both given; a problem has one of them")
        if self.entry_point and not self.tests:
            raise ValueError("entry_point is given without tests; name their column too")
        return self

    @model_validator(mode="after")
    def _templates(self) -> "Columns":
        for column, name in (("problem", "template"), ("answer", "answer_template")):
            template = getattr(self, name)
            if template is None:
                continue
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; write {{{{ for a brace") from None
            if not fields - {""}:
                raise ValueError(f"{name} names no column; write one in braces: {{{column}}}")
            if getattr(self, column) is not None:
                raise ValueError(f"{column} and {name} are both set; give one of them")
        return self


class FilesSource(Config):
    kind: Literal["files"] = Field(description="Kind of source.")
    path: str | list[str] = Field(
        description="File, folder or glob, or a list of them: Parquet, JSONL, JSON, CSV or TSV, "
        "all but Parquet also compressed."
    )
    columns: Columns = Field(default=Columns(), description="Column map.")
    answer_kind: AnswerKind = Field(
        default=AnswerKind.MATH, description="How answers are compared."
    )


class HubSource(Config):
    kind: Literal["hub"] = Field(description="Kind of source.")
    preset: str | None = Field(
        default=None,
        description="One of openthoughts-math, math-500, aime-2024, aime-2025, amc-2023, "
        "gpqa-diamond, gsm8k; sets the other fields.",
    )
    dataset: str | None = Field(
        default=None, description="Hugging Face dataset id, or a local folder."
    )
    subset: str | None = Field(default=None, description="Configuration name of the dataset.")
    split: str = Field(default="train", description="Split to read.")
    revision: str | None = Field(
        default=None, description="Commit or tag; pin it for reproducible ids."
    )
    columns: Columns = Field(default=Columns(), description="Column map.")
    answer_kind: AnswerKind = Field(
        default=AnswerKind.MATH, description="How answers are compared."
    )

    @model_validator(mode="after")
    def _one_of(self) -> "HubSource":
        if (self.preset is None) == (self.dataset is None):
            raise ValueError("give exactly one of preset and dataset")
        return self


class GymSource(Config):
    kind: Literal["reasoning-gym"] = Field(description="Kind of source.")
    task: str = Field(description="Name of a reasoning-gym task, e.g. chain_sum.")
    settings: dict[str, Any] = Field(default={}, description="The task's own settings.")
    instructions: bool = Field(
        default=True, description="Append a line that asks for a boxed answer."
    )
    scored: bool = added(
        False,
        "Keep with each problem what the task's own scorer needs, for the reward gym; its answers "
        "are then text, and none is left out as unparsable.",
    )


class ChampSource(Config):
    kind: Literal["champ"] = Field(description="Kind of source.")


class ArithmeticSource(Config):
    kind: Literal["arithmetic"] = Field(description="Kind of source.")
    operation: Operation = Field(default=Operation.ADD, description="Operation of the problems.")
    min_digits: int = Field(default=3, ge=1, le=9, description="Fewest digits per number.")
    max_digits: int = Field(default=5, ge=1, le=9, description="Most digits per number.")

    @model_validator(mode="after")
    def _ordered(self) -> "ArithmeticSource":
        if self.min_digits > self.max_digits:
            raise ValueError("min_digits is above max_digits")
        return self


class WordProblemsSource(Config):
    kind: Literal["word-problems"] = Field(description="Kind of source.")
    steps: int = Field(default=2, ge=2, le=3, description="Number of calculation steps.")


NamedSource = Annotated[
    FilesSource | HubSource | GymSource | ChampSource | ArithmeticSource | WordProblemsSource,
    Field(discriminator="kind"),
]
Source = Annotated[
    Annotated[NamedSource, Tag(NAMED)] | Annotated[OwnSource, Tag(OWN)], named_or_own("kind")
]


class ProblemsConfig(Config):
    """Stage problems: a source becomes a problems table."""

    source: Source = Field(description="Where problems come from.")
    limit: int | None = Field(default=None, ge=1, description="At most this many problems.")
    seed: int = Field(default=0, description="Seed of generated problems and of the shuffle.")
    shuffle: bool = Field(default=False, description="Shuffle before the limit is applied.")
    split: str = Field(default="train", description="Split recorded for each problem.")
    rows_per_part: int = Field(default=64, ge=1, description="Problems per Parquet part.")
    drop_unparsable: bool = Field(
        default=False,
        description="Drop problems whose gold answer does not parse instead of stopping.",
    )
    on_bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Stop at a row that can't be used, or skip such rows and count them.",
    )
    against: tuple[str, ...] = added(
        (),
        "Problems datasets (alias, id or stage/id) with which these problems should share no "
        "wording, such as evaluation sets: what they share is counted.",
    )
    overlap_words: int = added(
        13, "Words in a row that count as shared wording; shorter problems count whole.", ge=2
    )
    drop_overlap: bool = added(False, "Leave out problems that share wording with `against`.")

    @model_validator(mode="after")
    def _drops_something(self) -> "ProblemsConfig":
        if self.drop_overlap and not self.against:
            raise ValueError("drop_overlap is true, and against names no dataset; give one")
        return self

    def semantic(self) -> dict[str, Any]:
        """As of other configs; the default of `on_bad_rows` keeps the ids of older datasets."""
        found = super().semantic()
        if self.on_bad_rows == "refuse":
            del found["on_bad_rows"]
        return found
