"""Config of a study: methods and ablations over seeds, by stage train."""

from pydantic import Field, NonNegativeInt, model_validator

from .base import Config, operational
from .claims import MEASURES, ClaimConfig
from .problems import ProblemsConfig
from .train import TrainConfig
from .world import WorldConfig

_OWN = {"problems": "the training problems", "tuning": "the problems that tune"}


class ArmConfig(Config):
    """One row of a table: its changes to the study's `train`."""

    preset: str | None = Field(
        default=None, description="TRACE or a baseline by name (`trace-opd presets`)."
    )
    set: list[str] = Field(default=[], description="key=value overrides of `train`.")
    like: str | None = Field(
        default=None,
        description="Arm of the first ablation whose tuned choice this one takes; null: as "
        "configured. "
        "With its own choice the comparison would measure tuning.",
    )
    world: str | None = Field(
        default=None, description="World whose base it starts from; null: train.policy.path."
    )
    against: str | None = Field(
        default=None,
        description="Arm of the same ablation from which its difference is computed; null: grpo of "
        "this or of the first ablation.",
    )


class TuningConfig(Config):
    """The same budget for each arm of the first ablation: every choice runs once, the best is
    kept.
    """

    choices: list[list[str]] = Field(
        min_length=1, description="Sets of key=value overrides to choose from."
    )
    problems: ProblemsConfig = Field(
        description="Problems whose sampled pass rate, averaged over validations, decides; used "
        "for "
        "nothing else.",
    )
    seed: int = Field(default=1000, ge=0, description="Seed of the tuning runs; none of `seeds`.")


class ReportedConfig(Config):
    """A paper's figures for the same question, shown next to the study's."""

    source: str = Field(description="Source of the figures.")
    rows: dict[str, dict[str, float]] = Field(description="Figures by column, by row.")
    second_hand: dict[str, dict[str, float]] = Field(
        default={},
        description="More figures of these rows, read in another text than the paper; marked.",
    )

    @model_validator(mode="after")
    def _each_once(self) -> "ReportedConfig":
        for name, figures in self.second_hand.items():
            if name not in self.rows:
                raise ValueError(
                    f"second_hand {name!r} is none of rows; add it there, e.g. as {{}}"
                )
            if both := sorted(figures.keys() & self.rows[name].keys()):
                raise ValueError(f"{both[0]} of {name!r} is in rows and in second_hand; drop one")
        return self


class StudyConfig(Config):
    """Every arm of every ablation, over seeds; tables, plots and a page of the results."""

    name: str = Field(description="Folder of the results, and prefix of the problems' aliases.")
    problems: ProblemsConfig = Field(description="Training problems.")
    splits: dict[str, ProblemsConfig] = Field(
        min_length=1, description="Held-out problems by name; the first is the page's main one."
    )
    train: TrainConfig = Field(
        description="Shared by all arms; `validation` sets when to evaluate.",
        examples=[{"validation": {}}],
    )
    seeds: list[NonNegativeInt] = Field(min_length=1, description="A run per arm and seed.")
    tuning: TuningConfig | None = Field(
        default=None, description="Tune each arm first; null: as configured."
    )
    ablation_seeds: int | None = Field(
        default=None, ge=1, description="Number of seeds after the first ablation; null: all."
    )
    quick: list[str] = Field(default=[], description="key=value overrides that --quick applies.")
    ablations: dict[str, dict[str, ArmConfig]] = Field(
        default={},
        description="Arms by name, by ablation; the first is the page's main table. {}: claims "
        "alone.",
        examples=[{"methods": {"grpo": {"preset": "grpo"}, "trace-fkl": {"preset": "trace-fkl"}}}],
    )
    claims: dict[str, ClaimConfig] = Field(
        default={},
        description="Claims by name: arms compared at each point of a map of worlds. Tuning is not "
        "for them.",
    )
    worlds: dict[str, WorldConfig] = Field(
        default={},
        description="Worlds by name. The base of each is pre-trained once, and measured on the "
        "training problems for the page.",
    )
    mechanism: str | None = Field(
        default=None, description="Arm of the first ablation whose first step is analysed."
    )
    exposure: str | None = Field(
        default=None,
        description="Ablation whose Σλ² is plotted against the loss on the other splits.",
    )
    reported: ReportedConfig | None = Field(
        default=None, description="A paper's figures for the end of the page."
    )
    about: str = Field(
        default="",
        description="Markdown for the top of the page: how the task was chosen, what was left out.",
    )
    mean: bool = Field(
        default=False, description="A column with the splits' unweighted mean, as papers report it."
    )
    threshold: float = Field(
        default=0.8, gt=0, lt=1, description="Pass rate whose first step is reported."
    )
    bootstrap: int = Field(default=2_000, ge=100, description="Resamples of seeds and problems.")
    workers: int = operational(
        2, "Runs at once, each in a process with a share of the cores.", ge=1
    )

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if taken := sorted({"problems", "tuning"} & self.splits.keys()):
            raise ValueError(f"splits.{taken[0]} is the name of {_OWN[taken[0]]}; give it another")
        if self.train.validation is None:
            raise ValueError("train.validation is null, but a study needs its results; set it")
        if self.train.stop_on_collapse:
            raise ValueError(
                "train.stop_on_collapse is true, but a study compares complete runs; leave it false"
            )
        if self.tuning is not None and self.tuning.seed in self.seeds:
            raise ValueError("tuning.seed is one of seeds; tuning needs a seed of its own")
        self._check_claims()
        first = next(iter(self.ablations.values()), {})
        if self.mechanism is not None and self.mechanism not in first:
            raise ValueError(f"mechanism {self.mechanism!r} is none of {list(first)}")
        if self.exposure is not None and self.exposure not in self.ablations:
            raise ValueError(f"exposure {self.exposure!r} is none of {list(self.ablations)}")
        for ablation, rows in self.ablations.items():
            for name, arm in rows.items():
                if arm.like is not None and arm.like not in first:
                    raise ValueError(
                        f"ablations.{ablation}.{name}.like {arm.like!r} is none of {list(first)}"
                    )
                if arm.world is not None and arm.world not in self.worlds:
                    raise ValueError(
                        f"ablations.{ablation}.{name}.world {arm.world!r} is none of "
                        f"{list(self.worlds)}"
                    )
                if arm.against is not None and arm.against not in rows:
                    raise ValueError(
                        f"ablations.{ablation}.{name}.against {arm.against!r} is none of "
                        f"{list(rows)}"
                    )
        return self

    def _check_claims(self) -> None:
        if not self.ablations and not self.claims:
            raise ValueError("ablations and claims are empty; give one of them")
        if self.tuning is not None and not self.ablations:
            raise ValueError(
                "tuning tunes the arms of the first ablation, but there is none; drop it"
            )
        if both := sorted(self.ablations.keys() & self.claims.keys()):
            raise ValueError(f"{both[0]!r} is an ablation and a claim; rename one of them")
        for name in [*self.claims, *self.worlds]:
            # claims name files, and the table of bases parts the names of those that share one
            if any(character in name for character in "/;\n"):
                raise ValueError(f"name {name!r} has a /, a ; or a line break; rename it without")
        known = [*MEASURES, *self.splits]
        for name, claim in self.claims.items():
            for comparison in claim.comparisons:
                if comparison.of not in known:
                    raise ValueError(
                        f"claims.{name}.comparisons: of {comparison.of!r} is none of {known}"
                    )
