"""Claims in a study's config: what is laid over what, and what is refused."""

import pytest

from trace_opd.pipelines.study.arms import arms, study_runs
from trace_opd.pipelines.study.study import study_of
from trace_opd.schemas.configs import StudyConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config, override

from .claims_study import STUDY


def changed(overrides: list[str]) -> StudyConfig:
    return override(load_config(StudyConfig, STUDY), overrides)


def test_the_quick_form_may_change_claims():
    config = load_config(StudyConfig, STUDY)
    quick = override(config, config.quick)
    names = {(run.arm.ablation, run.arm.point) for run in study_runs(arms(quick), {})}
    assert names == {(claim, point) for claim in ("map", "line") for point in ("25 %", "50 %")}


def test_a_point_is_laid_over_its_arm_and_an_arm_over_its_preset():
    """World's base, preset, arm, x, y: the later wins."""
    rates = {"x": "train.optim.lr=3.0e-4", "y": "train.optim.lr=4.0e-4"}
    for axes, expected in (({}, 1e-3), ({"x"}, 3e-4), ({"x", "y"}, 4e-4)):
        changes = [
            f"claims.line.{axis}={{label: rate, points: {{own: [{rates[axis]}]}}}}" for axis in axes
        ]
        found = [arm for arm in arms(changed(changes)) if arm.name == "fkl"]
        assert found[-1].train.optim.lr == expected
    alone = changed(["claims.line.arms.fkl.set=[schedule.w0=0.25, policy.path=micro]"])
    last = arms(alone)[-1].train
    assert (last.schedule.w0, last.policy.path, last.optim.lr) == (0.25, "micro", 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("comparisons=[{higher: fkl, lower: x}]", r"claims\.line: comparisons: arm 'x' is none of"),
        ("comparisons=[{higher: fkl, lower: fkl}]", "higher and lower are both 'fkl'; name two"),
        (
            "comparisons=[{higher: fkl, lower: grpo, of: shorter}]",
            r"of 'shorter' is none of \['pass_rate', 'tokens', 'entropy', 'lift', 'test'",
        ),
        ("one_step=null", "of lift needs one_step; name the arm"),
        ("one_step=x", "one_step"),
        ("one_step=grpo", r"of lift compares grpo with one_step \(grpo\), not fkl with grpo"),
        ("x.points={}", "points is empty; give at least one"),
        ("x.points={a: [optim.lr=1]}", "'optim.lr=1' of point 'a' begins neither with world. nor"),
        ("x.points={a|b: [train.optim.lr=1]}", "'a|b' has a"),
        ("y={label: y, points: {a: [], 'a, a': []}}", "two points are named '25 %, a, a'"),
        ("arms.fkl.world=drift", r"arms\.fkl\.world: unknown key"),
        ("arms.fkl.like=grpo", r"arms\.fkl\.like: unknown key"),
        ("comparisons=[]", "comparisons"),
    ],
)
def test_a_claim_with_contradictions_is_refused(change, message):
    if "a, a" in change:
        change = change.replace("y=", "x.points={'25 %': [], '25 %, a': []}\0y=")
    with pytest.raises(InputError, match=message):
        changed([f"claims.line.{one}" for one in change.split("\0")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("claims={}", "ablations and claims are empty; give one"),
        ("ablations={map: {grpo: {preset: grpo}}}", "'map' is an ablation and a claim; rename"),
        ("worlds={a;b: {}}", r"name 'a;b' has a /, a ; or a line break; rename it"),
        (
            "tuning={choices: [[optim.lr=1]], problems: {source: {kind: arithmetic}}}",
            "tunes the arms of the first ablation, but there is none; drop it",
        ),
        ("mechanism=grpo", "mechanism 'grpo' is none of"),
    ],
)
def test_a_study_whose_claims_contradict_it_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        changed([change])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("[world.dropped_carries=1]", r"claims\.line, point 'a': dropped_carries: unknown key"),
        ("[world.edge=2]", r"claims\.line, point 'a': edge: .* 1 \(got 2\)"),
        ("[train.optim.rate=1]", r"claims\.line, point 'a': optim\.rate: unknown key"),
    ],
)
def test_a_points_bad_override_is_found_before_any_work_and_names_the_point(points, message):
    config = changed([f"claims.line.x.points={{a: {points}}}"])
    with pytest.raises(InputError, match=message):
        arms(config)


def test_an_arm_whose_first_step_is_analysed_has_key_tokens():
    config = changed(["claims.line.arms.fkl.preset=trace-rkl"])
    with pytest.raises(InputError, match=r"line\.one_step: arm 'fkl' routes no token to fkl at 25"):
        arms(config)


def test_one_claim_alone_has_the_runs_that_the_whole_study_has():
    whole = changed([])
    alone = study_of(whole, "line")
    assert alone.name == f"{whole.name}-line"
    keys = {run.key for run in study_runs(arms(alone), {})}
    assert keys == {run.key for run in study_runs(arms(whole), {}) if run.arm.ablation == "line"}
    with pytest.raises(InputError, match=r"--only lines: .* give one of map, line"):
        study_of(whole, "lines")
