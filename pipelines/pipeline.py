"""All stages by name, and how a request of any of them is run in this process."""

from collections.abc import Callable
from typing import Any

from ..data.store import Dataset, Store
from ..schemas import configs
from ..schemas.configs import Config, NoAnnotator, PipelineConfig
from ..schemas.environment import whole_number
from ..trace.rules import needs_annotations
from .stages import train
from .stages.annotate import ANNOTATE_STAGE
from .stages.base import Stage
from .stages.convert import CONVERT_STAGE
from .stages.evaluate import EVALUATE_STAGE
from .stages.problems import PROBLEMS_STAGE
from .stages.rollout import ROLLOUT_STAGE
from .stages.verify import VERIFY_STAGE
from .viewer import report

TABLE_STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        PROBLEMS_STAGE,
        ROLLOUT_STAGE,
        VERIFY_STAGE,
        ANNOTATE_STAGE,
        CONVERT_STAGE,
        EVALUATE_STAGE,
    )
}
CONFIG_TYPES: dict[str, type[Config]] = {
    **{name: stage.config_type for name, stage in TABLE_STAGES.items()},
    "train": configs.TrainConfig,
    "report": configs.ReportConfig,
}
# The alias that a finished dataset gets unless the request names one: what the next stage's
# config takes by default.
DEFAULT_ALIAS = {name: stage.contract.name for name, stage in TABLE_STAGES.items()} | {
    "train": "train"
}


def run_stage(
    name: str,
    config: Any,
    store: Store,
    alias: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Dataset | str:
    """Run one stage here and name its dataset; the report stage returns its file's path.

    announce: gets a line about the work before it begins (`train.run`).

    Raises:
        TooManyFailed: the dataset is there and named, but too much of it failed.
    """
    if name == "report":
        return str(report.run(config, store))
    if name == "train":
        dataset = train.run(config, store, announce)
    else:
        dataset = TABLE_STAGES[name].run(config, store)
    if whole_number("RANK", 0) == 0:  # of torchrun's processes one gives the name
        store.set_alias(alias or DEFAULT_ALIAS[name], dataset)
    if name in TABLE_STAGES:
        TABLE_STAGES[name].check(config, dataset)
    return dataset


RunStage = Callable[[str, Config, str], str]


def run_pipeline(config: PipelineConfig, run: RunStage) -> dict[str, str]:
    """All stages in order, each on the datasets of those before it.

    Where the routing looks at no annotation none is paid for: annotator none takes the place of the
    configured one.

    run: runs (stage, its config, alias) and returns the dataset's ref; a flow runs subflows here.
    Returns refs by role, and the report's path.
    """
    out: dict[str, str] = {}

    def step(role: str, stage: str, stage_config: Config, **links: Any) -> str:
        linked = stage_config.model_copy(update=links)
        out[role] = run(stage, linked, f"{config.name}-{role}")
        return out[role]

    problems = step("problems", "problems", config.problems)
    rollouts = step("rollouts", "rollout", config.rollout, problems=problems)
    verdicts = step("verdicts", "verify", config.verify, rollouts=rollouts)
    annotator = config.annotate.annotator
    if not needs_annotations(config.convert.routing):
        annotator = NoAnnotator(engine="none")
    annotations = step(
        "annotations", "annotate", config.annotate, verdicts=verdicts, annotator=annotator
    )
    routed = step("routed", "convert", config.convert, annotations=annotations)
    offline = config.train.offline.model_copy(update={"routed": routed})
    online = config.train.online.model_copy(update={"problems": problems})
    trained = step("train", "train", config.train, offline=offline, online=online)
    held_out = step("eval_problems", "problems", config.eval_problems)
    step("evaluation", "evaluate", config.evaluate, problems=held_out, trained=trained)
    step("report", "report", config.report, dataset=trained)
    return out
