"""A training that collapses: warned of, stopped with a checkpoint, and continued.

The arm of the micro study whose policy collapses (all tokens under the clipped KL), at a learning
rate at which it takes 4 steps. GRPO with the same settings is the control.
"""

import logging
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import METRICS, read_metrics
from trace_opd.pipelines.study.arms import arms
from trace_opd.pipelines.study.problem_sets import ProblemSets, problem_sets
from trace_opd.pipelines.training.collapse import CollapseGuard, method_name
from trace_opd.pipelines.viewer.training_curves import charts
from trace_opd.schemas.configs import StudyConfig, TrainConfig
from trace_opd.schemas.errors import Collapsed, InputError
from trace_opd.schemas.presets import PRESETS, preset_data
from trace_opd.schemas.settings import load_config, overlaid, override
from trace_opd.tests.kill.ends import untimed_metrics
from trace_opd.trace.ranks import Ranks

CONFIG = Path(__file__).parents[3] / "studies" / "micro.yaml"
SMALL = [
    "online.steps=6",
    "optim.lr=2.0e-4",
    "validation.every=4",
    "validation.greedy=false",
    "collapse.baseline_steps=2",
    "collapse.window_steps=2",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A store with the micro study's problems, and its arms by name, made small."""
    config = load_config(StudyConfig, CONFIG)
    config = config.model_copy(update={"splits": {"test": config.splits["test"]}, "tuning": None})
    store = Store(tmp_path_factory.mktemp("collapse"))
    made = problem_sets(config, store, [None])[None]
    test = ProblemSets(made.problems, {}, {"test": made.splits["test"]})
    found = arms(config, sets={None: test})
    return store, {arm.name: override(arm.train, SMALL) for arm in found}


def runs(store: Store) -> set[Path]:
    return set(store.files.local_path("train").iterdir())


def test_a_collapse_stops_the_run_with_a_checkpoint_and_the_run_can_go_on(study, caplog):
    store, methods = study
    config = methods["all-token entry_above"]
    stopping = override(config, ["stop_on_collapse=true"])
    with caplog.at_level(logging.WARNING), pytest.raises(Collapsed) as stopped:
        run_stage("train", stopping, store)
    assert stopped.value.exit_code == 3
    sentence = str(stopped.value)
    assert "preset all-token-fkl, step 3: " in sentence
    assert "stop_on_collapse=false" in sentence
    warnings = [r.getMessage() for r in caplog.records if "collapse" in r.name]
    assert any(w.startswith("preset all-token-fkl, step 3: validation_test_") for w in warnings)

    (run,) = runs(store)
    assert [line["step"] for line in read_metrics(run / METRICS)] == [0, 1, 2, 3]
    assert (run / "checkpoints" / "step-00004").is_dir()
    with pytest.raises(Collapsed) as again:  # at once: it is the same run
        run_stage("train", stopping, store)
    assert str(again.value) == sentence
    assert len(read_metrics(run / METRICS)) == 4

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made = run_stage("train", config, store)
    assert made.path() == str(run)
    assert not [r for r in caplog.records if r.name.endswith("collapse") and "step 3" in r.message]
    assert [line["step"] for line in read_metrics(run / METRICS)] == list(range(6))


def test_grpo_with_the_same_settings_raises_no_alarm(study, caplog):
    store, methods = study
    with caplog.at_level(logging.WARNING):
        made = run_stage("train", override(methods["grpo"], ["stop_on_collapse=true"]), store)
    assert len(untimed_metrics(Path(made.path()))) == 6
    assert not [r for r in caplog.records if "collapse" in r.name]


def test_watching_does_not_enter_a_runs_id(study):
    config = study[1]["grpo"]
    watched = override(config, ["stop_on_collapse=true", "collapse.entropy_ratio=9"])
    assert watched.semantic() == config.semantic()


def test_a_collapse_in_the_last_step_stops_nothing(study, tmp_path):
    config = override(study[1]["grpo"], ["stop_on_collapse=true"])
    healthy = [{"step": step, "response_tokens": 50.0, "entropy": 0.1} for step in range(4)]

    def guard() -> CollapseGuard:
        made = CollapseGuard(config, tmp_path, 0, Ranks())
        for line in healthy:
            made.observe(line)
        return made

    def check(made: CollapseGuard, metrics: dict) -> None:
        made.observe(metrics)
        made.stop_after(metrics)

    with pytest.raises(Collapsed, match=r"preset grpo, step 4: entropy is 0\.55"):
        check(guard(), {"step": 4, "entropy": 1.0})
    check(guard(), {"step": 5, "entropy": 1.0})


@pytest.mark.parametrize("name", PRESETS)
def test_the_method_is_named_by_a_preset_of_the_same_settings(name):
    plain = TrainConfig(online={"steps": 1})  # type: ignore[arg-type]
    config = overlaid(plain, preset_data(name, TrainConfig), [])
    named = method_name(config).removeprefix("preset ")
    assert overlaid(plain, preset_data(named, TrainConfig), []) == config


def test_a_method_that_is_no_preset_is_named_by_its_routing():
    config = override(
        TrainConfig(online={"steps": 1}),  # type: ignore[arg-type]
        ["online.routing.rule=all", "online.routing.key=fkl", "online.routing.error=rkl"],
    )
    assert method_name(config) == "rule=all, key=fkl, error=rkl, teacher_context=type"
    offline = TrainConfig(offline={"steps": 1, "routed": "mine"})  # type: ignore[arg-type]
    assert method_name(offline) == "training on mine"


def test_the_report_draws_the_loops():
    drawn = charts([{"step": 0, "looping": 0.1, "truncated": 0.2, "pass_rate_se": 0.3}])
    series = {chart["title"]: [one["name"] for one in chart["series"]] for chart in drawn}
    assert series["Truncated, looping, no signal"] == ["looping", "truncated"]
    assert series["Reward"] == ["pass_rate_se"]


def test_a_study_refuses_to_stop_an_arm():
    with pytest.raises(InputError, match="a study compares complete runs"):
        load_config(StudyConfig, CONFIG, ["train.stop_on_collapse=true"])
