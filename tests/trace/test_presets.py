"""The choices that define each preset, on one group's routed table. test_preset_losses.py tests the
gradients.
"""

import pytest

from trace_opd.schemas.configs import ConvertConfig, RoutingConfig, TrainConfig
from trace_opd.schemas.labels import DiagnosticType, Route
from trace_opd.schemas.presets import PRESETS
from trace_opd.schemas.settings import load_config

# Nine tokens each, the end token included; α = 1/4 of them is two.
TOKENS, ROOM = 9, 2
RIGHT = {"text": "ab\ncd\nef", "correct": True, "label": DiagnosticType.COUNTING, "marked": ([1],)}
OTHER = RIGHT | {"text": "gh\nij\nkl"}
WRONG = {"text": "AB\nCD\nEF", "correct": False, "label": DiagnosticType.SETUP, "marked": ([0],)}
UNMARKED = {"text": "mn\nop\nqr", "correct": False}


def routing(preset: str) -> RoutingConfig:
    return load_config(ConvertConfig, None, [], preset=preset).routing


def rows(example, preset: str, *samples: dict) -> list[dict]:
    return example(*samples).routed(routing(preset))


def routes(example, preset: str, *samples: dict) -> list[list[int]]:
    return [row["route"] for row in rows(example, preset, *samples)]


def every_token(route: Route) -> list[int]:
    return [int(route)] * TOKENS


PLAIN = every_token(Route.GRPO)


def test_the_list_holds_the_paper_its_baselines_and_the_methods_since():
    assert set(PRESETS) == {
        "trace-fkl", "trace-rkl", "trace-both", "steps-fkl", "steps-rkl", "grpo", "all-token-fkl",
        "all-token-rkl", "random-alpha", "inverted-alpha", "sdpo", "sdpo-top100", "srpo",
        "srpo-top100", "rlsd", "opsd", "opsd-v1", "foreign-solution", "pw-opsd", "tip", "ta-opd",
        "sdpg", "ssopd", "rosd", "antisd", "rlrt", "rlcsd", "dasd", "egrsd", "amr-sd", "credit",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "key", "error"),
    [("trace-fkl", Route.FKL, 0), ("trace-rkl", 0, Route.RKL), ("trace-both", 1, Route.RKL)],
)
def test_trace_routes_spans_within_alpha_to_the_corner(example, preset, key, error):
    assert routes(example, preset, RIGHT, WRONG, UNMARKED) == [
        [0, 0, 0, key, key, 0, 0, 0, 0],
        [error, error, 0, 0, 0, 0, 0, 0, 0],
        PLAIN,
    ]


def test_trace_gives_its_teacher_only_the_label(example):
    for preset in ("trace-fkl", "trace-rkl", "trace-both"):
        for row in rows(example, preset, RIGHT, WRONG):
            assert row["teacher_context"] is None
    right, wrong = rows(example, "trace-both", RIGHT, WRONG)
    assert (right["diagnostic_type"], wrong["diagnostic_type"]) == ("counting", "setup")


def test_grpo_routes_nothing_and_its_weight_is_0(example):
    assert routes(example, "grpo", RIGHT, OTHER, WRONG) == [PLAIN] * 3
    assert load_config(TrainConfig, None, STEPS, preset="grpo").schedule.w0 == 0


@pytest.mark.parametrize(
    ("preset", "route"), [("all-token-fkl", Route.FKL), ("all-token-rkl", Route.RKL)]
)
def test_all_token_self_distillation_routes_every_token_of_labelled_responses(
    example, preset, route
):
    found = rows(example, preset, RIGHT, WRONG, UNMARKED)
    assert [row["route"] for row in found] == [every_token(route), every_token(route), PLAIN]
    assert [row["teacher_context"] for row in found] == [None] * 3


@pytest.mark.parametrize("preset", ["random-alpha", "inverted-alpha"])
def test_the_mask_ablations_route_alpha_of_the_tokens_to_the_same_corner(example, preset):
    right, wrong = routes(example, preset, RIGHT, WRONG)
    assert (right.count(Route.FKL), right.count(Route.GRPO)) == (ROOM, TOKENS - ROOM)
    assert wrong == PLAIN  # the default corner: error → none
    if preset == "inverted-alpha":
        assert right[3:6] == [Route.GRPO] * 3


def test_sdpo_routes_every_token_of_responses_with_a_correct_peer(example):
    assert routes(example, "sdpo", RIGHT, OTHER, WRONG) == [every_token(Route.JSD)] * 3
    assert [row["teacher_context"] for row in rows(example, "sdpo", RIGHT, OTHER, WRONG)] == [
        OTHER["text"],
        RIGHT["text"],
        RIGHT["text"],
    ]
    # The only correct response has no peer to learn from.
    assert routes(example, "sdpo", RIGHT, WRONG) == [PLAIN, every_token(Route.JSD)]


def test_srpo_corrects_wrong_responses_with_a_peer_and_leaves_the_rest_to_grpo(example):
    alone = WRONG | {"group": "h"}
    found = rows(example, "srpo", RIGHT, OTHER, WRONG, alone)
    assert [row["route"] for row in found] == [PLAIN, PLAIN, every_token(Route.JSD), PLAIN]
    assert [row["teacher_context"] for row in found] == [None, None, RIGHT["text"], None]


def test_rlsd_reweights_every_token_by_a_teacher_that_reads_the_solution(example):
    found = rows(example, "rlsd", RIGHT, WRONG)
    assert [row["route"] for row in found] == [every_token(Route.REWEIGHT)] * 2
    assert [row["teacher_context"] for row in found] == ["solution g"] * 2


def test_opsd_routes_every_token_to_a_teacher_that_reads_the_solution(example):
    found = rows(example, "opsd", RIGHT, WRONG)
    assert [row["route"] for row in found] == [every_token(Route.FKL)] * 2
    assert [row["teacher_context"] for row in found] == ["solution g"] * 2


@pytest.mark.parametrize("preset", ["rlsd", "opsd", "opsd-v1", "pw-opsd", "dasd", "egrsd"])
def test_without_a_solution_such_presets_are_grpo(example, preset):
    made = example(RIGHT, WRONG).with_problems(solution=None)
    assert [row["route"] for row in made.routed(routing(preset))] == [PLAIN] * 2


STEPS = ["online.steps=1"]


@pytest.mark.parametrize(
    ("preset", "grpo", "sync", "constant"),
    [
        ("trace-both", True, "periodic", False),
        ("grpo", True, "periodic", False),
        ("sdpo", False, "ema", True),
        ("srpo", True, "ema", True),
        ("rlsd", True, "periodic", False),
        ("opsd", False, "frozen", True),
        ("opsd-v1", False, "frozen", True),
        ("rosd", False, "frozen", True),
        ("tip", False, "frozen", True),
        ("antisd", True, "periodic", True),
        ("ssopd", True, "frozen", True),
        ("rlcsd", True, "periodic", True),
        ("amr-sd", True, "periodic", False),
    ],
)
def test_objective_teacher_and_schedule_are_the_presets(preset, grpo, sync, constant):
    config = load_config(TrainConfig, None, STEPS, preset=preset)
    assert config.loss.grpo is grpo
    assert config.teacher.sync == sync
    assert (config.schedule.decay_steps is None) is constant
    assert (config.loss.entropy_beta > 0) is (preset == "srpo")
