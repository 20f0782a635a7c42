"""Types of mistakes and reflections through the stages, from annotations to teachers' prompts."""

from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages import train
from trace_opd.schemas.configs import (
    AnnotateConfig,
    ConvertConfig,
    ProblemsConfig,
    RolloutConfig,
    TrainConfig,
    VerifyConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import ErrorType
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[3]
CONFIGS = {
    "problems": ProblemsConfig,
    "rollout": RolloutConfig,
    "verify": VerifyConfig,
    "annotate": AnnotateConfig,
    "convert": ConvertConfig,
    "train": TrainConfig,
}


def config(stage: str, *overrides: str) -> Any:
    return load_config(CONFIGS[stage], str(ROOT / "configs" / "micro.yaml"), list(overrides), stage)


def run(store: Store, stage: str, alias: str, *overrides: str) -> Dataset:
    dataset = run_stage(stage, config(stage, *overrides), store)
    store.set_alias(alias, dataset)
    return dataset


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Rollouts of the policy micro with annotations of both forms."""
    store = Store(tmp_path_factory.mktemp("store"))
    run(store, "problems", "problems", "limit=6")
    run(store, "rollout", "rollouts", "problems=problems", "group_size=4", "seed=1")
    run(store, "verify", "verdicts", "rollouts=rollouts")
    plain = ("verdicts=verdicts", "annotator.engine=rule")
    run(store, "annotate", "plain", *plain)
    more = ("annotator.error_types=true", "annotator.reflection=true")
    run(store, "annotate", "named", *plain, *more)
    return store


def test_mistakes_and_ideas_go_from_the_annotator_to_the_routed_rows(store: Store):
    named = store.get("named")
    assert named.id != store.get("plain").id
    wrong = [row for row in named.read().to_pylist() if row["correct"] is False]
    assert wrong
    assert {row["diagnostic_type"] for row in wrong} <= {*ErrorType, None}
    assert {row["diagnostic_type"] for row in wrong} & {*ErrorType}
    ideas = {row["rollout_id"]: row["reflection"] for row in wrong}
    assert all(ideas.values())
    both = ("routing.rule=spans", "routing.key=fkl", "routing.error=rkl")
    typed = run(store, "convert", "typed", "annotations=named", *both).read().to_pylist()
    labels = {row["diagnostic_type"] for row in typed if not row["correct"]}
    assert labels & {*ErrorType}
    assert all(row["teacher_context"] is None for row in typed)
    context = ("routing.teacher_context=reflection", "routing.rule=all")
    made = run(store, "convert", "reflected", "annotations=named", *both, *context).read()
    for row in made.to_pylist():
        assert row["teacher_context"] == ideas.get(row["rollout_id"])
        assert any(row["route"]) == (row["rollout_id"] in ideas)


def test_a_teacher_that_reads_reflections_needs_annotations_with_them(store: Store):
    context = ("routing.teacher_context=reflection", "annotations=plain", "routing.error=rkl")
    with pytest.raises(InputError, match=r"no reflections: .* annotate again with annotator.refl"):
        run_stage("convert", config("convert", *context), store)


@pytest.mark.parametrize(
    ("routing", "why"),
    [
        ("teacher_context=reflection", r"no reflections: .* set online.annotator.reflection=true"),
        ("rule=importance", "routing.rule importance: reads student_entropy and divergence"),
    ],
)
def test_online_training_says_before_it_begins_what_its_routing_lacks(
    store: Store, routing: str, why: str
):
    asked = ("online.steps=1", "offline.steps=0", "online.problems=problems")
    online = config("train", *asked, f"online.routing.{routing}", "online.routing.error=rkl")
    with pytest.raises(InputError, match=why):
        train.begin(online, store)
