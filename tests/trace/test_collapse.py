"""The watch on collapse: its limits by hand, and what it says of recorded runs."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from trace_opd.schemas.configs.train import CollapseConfig
from trace_opd.trace.collapse import CollapseWatch

# Written by `make bench-collapse`: arms of the micro study, trained again.
RECORDED = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "collapse.json").read_text()
)
SHORT = CollapseConfig(baseline_steps=2, window_steps=2)
HEALTHY = {"response_tokens": 100.0, "entropy": 0.2, "looping": 0.0, "pass_rate": 0.5,
           "pass_rate_se": 0.02}  # fmt: skip


def steps(*changes: dict) -> list[dict]:
    return [{"step": step} | HEALTHY | change for step, change in enumerate(changes)]


def raised(watch: CollapseWatch, lines: list[dict]) -> list[tuple[int, str]]:
    return [(alarm.step, alarm.figure) for line in lines for alarm in watch.observe(line)]


@pytest.mark.parametrize(
    ("figure", "fine", "beyond"),
    [
        ("response_tokens", 60.0, 59.0),
        ("entropy", 0.4, 0.41),
        ("looping", 0.1, 0.11),
        ("pass_rate", 0.25, 0.24),
    ],
)
def test_a_figure_raises_an_alarm_beyond_its_limit(figure, fine, beyond):
    first = [{}, {}]
    assert raised(CollapseWatch(SHORT), steps(*first, *[{figure: fine}] * 4)) == []
    watch = CollapseWatch(SHORT)
    assert raised(watch, steps(*first, *[{figure: beyond}] * 4)) == [(3, figure)]
    alarm = watch.active[figure]
    assert (alarm.value, alarm.before) == (beyond, HEALTHY[figure])


def test_one_strange_step_is_no_collapse():
    """The median over the window, of the first steps as of the latest ones."""
    config = CollapseConfig(baseline_steps=3, window_steps=3)
    strange = {"entropy": 9.0, "response_tokens": 1.0, "looping": 1.0, "pass_rate": 0.0}
    lines = steps({}, strange, {}, {}, strange, {}, {}, {})
    assert raised(CollapseWatch(config), lines) == []


def test_a_fall_of_entropy_is_no_collapse():
    assert raised(CollapseWatch(SHORT), steps({}, {}, *[{"entropy": 0.001}] * 4)) == []


def test_a_pass_rate_falls_beyond_chance():
    """0.5 to 0.1 in steps known to ±0.2 each: √(0.2²/2 + 0.2²/2) = 0.2, × 3 = 0.6."""
    lines = steps({}, {}, {"pass_rate": 0.1}, {"pass_rate": 0.1})
    vague = [line | {"pass_rate_se": 0.2} for line in lines]
    assert raised(CollapseWatch(SHORT), vague) == []
    known = [line | {"pass_rate_se": 0.1} for line in lines]  # 3 × 0.1 = 0.3 < 0.4
    assert raised(CollapseWatch(SHORT), known) == [(3, "pass_rate")]
    one_problem = [{k: v for k, v in line.items() if k != "pass_rate_se"} for line in lines]
    assert raised(CollapseWatch(SHORT), one_problem) == []


@pytest.mark.parametrize(
    ("answers", "rate", "alarm"),
    [
        # √(0.5 · 0.5 / 1000 + 0.39 · 0.61 / 1000) = 0.022, × 3 = 0.066: the limit is the drop's.
        (1000, 0.41, False),
        (1000, 0.39, True),
        # With 100 answers 3 standard errors are 0.21 and 0.20.
        (100, 0.31, False),
        (100, 0.27, True),
    ],
)
def test_a_validation_is_compared_with_its_best_and_beyond_chance(answers, rate, alarm):
    name = "validation_test_sampled"
    watch = CollapseWatch(CollapseConfig(), {name: (0.3, answers)})
    lines = steps({}, {name: 0.5}, {}, {name: rate}, {})
    assert raised(watch, lines) == ([(3, name)] if alarm else [])
    assert (name in watch.active) is alarm  # until the next validation
    watch.observe({"step": 5, name: 0.5})
    assert not watch.active


def test_a_resumed_watch_goes_on_as_it_was():
    lines = steps({}, {}, *[{"entropy": 0.3}] * 3, *[{"entropy": 0.5}] * 4)
    whole, resumed = CollapseWatch(SHORT), CollapseWatch(SHORT)
    assert raised(whole, lines) == [(6, "entropy")]
    for cut in range(len(lines)):
        resumed = CollapseWatch(SHORT)
        before = raised(resumed, lines[:cut])
        assert before + raised(resumed, lines[cut:]) == [(6, "entropy")]
        assert resumed.active == whole.active


def test_steps_without_a_figure_are_left_out():
    empty = {"step": 1, "sequences": 0.0, "tokens": 0.0}
    first, second, third, fourth = steps({}, {}, {"entropy": 1.0}, {"entropy": 1.0})
    lines = [first, empty, second, third, empty, fourth]
    assert raised(CollapseWatch(SHORT), lines) == [(3, "entropy")]


@pytest.fixture(scope="module")
def alarms() -> dict[str, list[list[tuple[int, str]]]]:
    """Alarms of each recorded run, by method; "broken" are those at a rate beyond the study's."""
    found = defaultdict(list)
    for run in RECORDED:
        watch = CollapseWatch(CollapseConfig(), run["base"])
        broken = " broken" if run["choice"] in ("optim.lr=1.0e-3", "optim.lr=2.0e-3") else ""
        found[run["method"] + broken].append(raised(watch, run["steps"]))
    return found


@pytest.mark.parametrize("method", ["sdpo", "all-token entry_above"])
def test_the_study_s_collapses_raise_an_alarm_in_every_run(alarms, method):
    """Both end below 15 % of test; they are seen by the first validation, after 12 of 24 steps."""
    assert len(alarms[method]) > 1
    for run in alarms[method]:
        assert min(step for step, _ in run) <= 11
        assert "validation_test_sampled" in {figure for _, figure in run}


@pytest.mark.parametrize(
    "method", ["grpo", "trace-fkl", "trace-rkl", "trace-both", "srpo", "rlsd", "all-token-rkl"]
)
def test_methods_of_the_study_that_learn_raise_none(alarms, method):
    assert len(alarms[method]) > 1
    assert not any(alarms[method])


@pytest.mark.parametrize(
    ("method", "figures"),
    [
        ("sdpo broken", {"entropy", "looping"}),
        ("all-token entry_above broken", {"entropy"}),
        ("all-token-rkl broken", set()),
    ],
)
def test_runs_at_rates_that_break_them_raise_other_alarms_too(alarms, method, figures):
    (run,) = alarms[method]
    found = {figure for _, figure in run}
    assert {figure for figure in found if not figure.startswith("validation_")} == figures
    assert "validation_test_sampled" in found


def test_the_recorded_runs_are_complete():
    for run in RECORDED:
        assert [line["step"] for line in run["steps"]] == list(range(24))
        assert all(set(HEALTHY) <= line.keys() for line in run["steps"])
