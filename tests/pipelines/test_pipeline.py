"""All stages in order: which config each gets from the pipeline's."""

from pathlib import Path

import pytest

from trace_opd.pipelines.pipeline import run_pipeline
from trace_opd.schemas.configs import Config, PipelineConfig
from trace_opd.schemas.presets import PRESETS
from trace_opd.schemas.settings import load_config

MICRO = Path(__file__).parents[2] / "configs" / "micro.yaml"


def requests(config: PipelineConfig) -> dict[str, tuple[str, Config]]:
    """By alias: stage and config of each request that the pipeline makes."""
    made = {}

    def run(stage: str, stage_config: Config, alias: str) -> str:
        made[alias] = (stage, stage_config)
        return f"{stage}/made-for-{alias}"

    run_pipeline(config, run)
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_annotations_are_paid_for_only_where_the_routing_looks_at_them(name):
    config = load_config(PipelineConfig, MICRO, preset=name)
    asked = {"trace-fkl", "trace-rkl", "trace-both", "random-alpha", "inverted-alpha"}
    asked |= {"steps-fkl", "steps-rkl"}
    asked |= {"all-token-fkl", "all-token-rkl"}  # their teacher sees the type label
    asked |= {"rosd", "amr-sd"}  # theirs reads the reflection
    _, annotate = requests(config)["demo-annotations"]
    assert annotate.annotator.engine == ("rule" if name in asked else "none")  # pyright: ignore
    assert config.annotate.annotator.engine == "rule"


def test_each_stage_works_on_what_the_one_before_it_made():
    made = requests(load_config(PipelineConfig, MICRO))
    links = {
        ("demo-rollouts", "problems"): "demo-problems",
        ("demo-verdicts", "rollouts"): "demo-rollouts",
        ("demo-annotations", "verdicts"): "demo-verdicts",
        ("demo-routed", "annotations"): "demo-annotations",
        ("demo-evaluation", "problems"): "demo-eval_problems",
        ("demo-evaluation", "trained"): "demo-train",
        ("demo-report", "dataset"): "demo-train",
    }
    for (alias, field), source in links.items():
        assert getattr(made[alias][1], field) == f"{made[source][0]}/made-for-{source}"
    _, train = made["demo-train"]
    assert train.offline.routed == "convert/made-for-demo-routed"  # pyright: ignore
    assert train.online.problems == "problems/made-for-demo-problems"  # pyright: ignore
