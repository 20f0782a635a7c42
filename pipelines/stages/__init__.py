"""The registry of stages. The command line, flows.py and prefect.yaml follow from it.

A new stage is a file in this folder that exports `STAGE`, and a line in `REGISTRY`. The registry
imports no stage: `trace-opd --help` must not wait for torch.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...schemas import configs
from ...schemas.configs import Config
from ...schemas.extras import require


@dataclass(frozen=True)
class StageEntry:
    """A stage without its code.

    summary: help of the command and description of the flow. alias: default name of its dataset,
    the next stage's default input; None: the stage's name, or no dataset. gpu: its Kubernetes
    deployment requests a GPU.
    """

    name: str
    config_type: type[Config]
    summary: str
    alias: str | None
    gpu: bool = False

    def load(self) -> Any:
        """The file's `STAGE`: a `base.Stage`, or a `base.SingleStage` if it has no parts.

        Raises:
            InputError: the extra `pipelines` is not installed; some stages import it late.
        """
        require("math_verify", "openai", "polars")
        return import_module(f".{self.name}", __package__).STAGE


REGISTRY: dict[str, StageEntry] = {
    entry.name: entry
    for entry in (
        StageEntry(
            "problems", configs.ProblemsConfig, "A source becomes a problems table.", "problems"
        ),
        StageEntry(
            "rollout",
            configs.RolloutConfig,
            "Sample a group of responses per problem.",
            "rollouts",
            gpu=True,
        ),
        StageEntry(
            "verify", configs.VerifyConfig, "Judge final answers against gold answers.", "verdicts"
        ),
        StageEntry(
            "annotate", configs.AnnotateConfig, "Mark key spans and error spans.", "annotations"
        ),
        StageEntry(
            "convert", configs.ConvertConfig, "Spans to routed training sequences.", "routed"
        ),
        StageEntry(
            "score",
            configs.ScoreConfig,
            "A teacher's likeliest tokens at the routed tokens.",
            "scores",
            gpu=True,
        ),
        StageEntry(
            "train", configs.TrainConfig, "Offline steps, then online steps.", "train", gpu=True
        ),
        StageEntry(
            "evaluate",
            configs.EvaluateConfig,
            "avg@k, pass@k, maj@k; base against checkpoint.",
            "evaluations",
            gpu=True,
        ),
        StageEntry("report", configs.ReportConfig, "One self-contained HTML file.", None),
    )
}
