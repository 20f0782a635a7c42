"""All stages in this process: one by name, or the pipeline of them in order.

The command line and the study call `run_stage`; flows.py passes its subflows to `run_pipeline`.
"""

from collections.abc import Callable
from typing import Any

from ..data.store import Dataset, Store
from ..schemas.aliases import require_alias
from ..schemas.configs import Config, NoAnnotator, PipelineConfig
from ..schemas.environment import whole_number
from ..schemas.errors import InputError
from ..trace.route import needs_annotations
from .stages import REGISTRY
from .stages.base import give_name


def run_stage(name: str, config: Any, store: Store, alias: str | None = None) -> Dataset | str:
    """Run one stage in this process and name its dataset; the report stage returns its file's path.

    Raises:
        InputError: no stage of that name, or the config of another stage.
        TooManyFailed: the dataset is finished and named, but too many of its rows failed.
    """
    require_alias(alias)
    entry = REGISTRY.get(name)
    if entry is None:
        raise InputError(f"stage {name!r} is unknown; known: {', '.join(REGISTRY)}")
    wanted = entry.config_type
    if not isinstance(config, wanted):
        raise InputError(
            f"stage {name} takes {wanted.__name__}, not {type(config).__name__}; make it with "
            f"load_config({wanted.__name__}, FILE, OVERRIDES, {name!r})"
        )
    stage = entry.load()
    made = stage.run(config, store)
    if not isinstance(made, Dataset):
        return str(made)
    if whole_number("RANK", 0) == 0:  # one of torchrun's processes sets the name
        give_name(store, alias or entry.alias or name, made)
    stage.check(config, made)
    return made


RunStage = Callable[[str, Config, str], str]


def run_pipeline(config: PipelineConfig, run: RunStage) -> dict[str, str]:
    """Run all stages in order, each on the datasets of the stages before it.

    Without offline steps the stages from rollout to convert are left out: online steps sample,
    verify, annotate and route themselves. If the routing needs no annotations, annotator none
    replaces the configured one, so that none is paid for.

    run: runs (stage, its config, alias) and returns the dataset's ref; a flow runs a subflow.
    Returns refs by role, and the report's path.
    """
    out: dict[str, str] = {}

    def step(role: str, stage: str, stage_config: Config, **links: Any) -> str:
        linked = stage_config.model_copy(update=links)
        out[role] = run(stage, linked, f"{config.name}-{role}")
        return out[role]

    problems = step("problems", "problems", config.problems)
    offline, teacher = config.train.offline, config.train.teacher
    if config.annotate is not None and offline.steps:
        rollouts = step("rollouts", "rollout", config.rollout, problems=problems)
        verdicts = step("verdicts", "verify", config.verify, rollouts=rollouts)
        annotator = config.annotate.annotator
        if not needs_annotations(config.convert.routing):
            annotator = NoAnnotator(engine="none")
        annotations = step(
            "annotations", "annotate", config.annotate, verdicts=verdicts, annotator=annotator
        )
        routed = step("routed", "convert", config.convert, annotations=annotations)
        offline = offline.model_copy(update={"routed": routed})
        if config.score is not None:
            scores = step("scores", "score", config.score, routed=routed)
            teacher = teacher.model_copy(update={"scores": scores})
    online = config.train.online.model_copy(update={"problems": problems})
    models: dict[str, Any] = {"offline": offline, "online": online, "teacher": teacher}
    trained = step("train", "train", config.train, **models)
    held_out = step("eval_problems", "problems", config.eval_problems)
    step("evaluation", "evaluate", config.evaluate, problems=held_out, trained=trained)
    step("report", "report", config.report, dataset=trained)
    return out
