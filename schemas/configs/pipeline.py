"""Configs of stages evaluate and report, and of the pipeline."""

from pydantic import Field, model_validator

from ..aliases import AliasName
from .annotate import AnnotateConfig, ConvertConfig, VerifyConfig
from .base import Config
from .problems import ProblemsConfig
from .rollout import (
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    Sampler,
    SamplingConfig,
    TransformersSampler,
)
from .score import ScoreConfig
from .select import SelectConfig
from .train import TrainConfig


class EvaluateConfig(Config):
    """Stage evaluate: avg@k, pass@k, maj@k of the base and of a trained checkpoint."""

    problems: str = Field(
        default="problems", description="Problems dataset: alias, id or stage/id."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="The base policy.")
    trained: str | None = Field(
        default=None,
        description="Train dataset whose final checkpoint is compared; null: base alone.",
    )
    sampler: Sampler = Field(default=TransformersSampler(), description="Sampling engine.")
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    sampling: SamplingConfig = Field(
        default=SamplingConfig(temperature=0.6, top_p=0.95, top_k=20),
        description="Sampling parameters.",
    )
    k: int = Field(default=8, ge=1, description="Samples per problem.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verification.")
    bootstrap: int = Field(default=10_000, ge=100, description="Bootstrap resamples of problems.")
    seed: int = Field(default=0, ge=0, description="Seed of sampling and bootstrap.")


class ReportConfig(Config):
    """Stage report: one self-contained HTML file for a dataset."""

    dataset: str = Field(
        default="routed",
        description="Routed, annotations, verdicts or scores dataset, or a train run.",
    )
    against: str | None = Field(
        default=None,
        description="Annotations dataset of the same rollouts to compare with; `dataset` must be "
        "an "
        "annotations dataset then. null: one annotator.",
    )
    limit: int = Field(default=2000, ge=1, description="At most this many rollouts on the page.")


class PipelineConfig(Config):
    """All stages in order; each stage's input is the stage before it.

    Without offline steps there are no stages from rollout to convert: online steps do their work.
    """

    name: AliasName = Field(
        default="default", description="Prefix of the aliases that the run sets."
    )
    problems: ProblemsConfig = Field(description="Training problems.")
    eval_problems: ProblemsConfig = Field(description="Held-out problems for evaluation.")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="Rollout stage.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verify stage.")
    select: SelectConfig | None = Field(
        default=None, description="Select stage; null: every response is annotated."
    )
    annotate: AnnotateConfig | None = Field(
        default=None, description="Annotate stage; offline steps need it."
    )
    convert: ConvertConfig = Field(default=ConvertConfig(), description="Convert stage.")
    score: ScoreConfig | None = Field(
        default=None,
        description="Score stage: its dataset takes the teacher's place in the offline steps "
        "(train.teacher.scores); null: none.",
    )
    train: TrainConfig = Field(description="Train stage.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Evaluate stage.")
    report: ReportConfig = Field(default=ReportConfig(), description="Report stage.")

    @model_validator(mode="after")
    def _annotated(self) -> "PipelineConfig":
        if self.train.offline.steps and self.annotate is None:
            raise ValueError(
                "annotate is missing, and train.offline.steps is "
                f"{self.train.offline.steps}: give it an annotator, or set train.offline.steps=0 "
                "to train on fresh rollouts from the first step"
            )
        if self.score is not None and not self.train.offline.steps:
            raise ValueError(
                "score has no routed dataset while train.offline.steps is 0: give offline steps, "
                "or leave score out"
            )
        return self
