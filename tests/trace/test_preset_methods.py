"""What defines each method since the paper, token by token, on tensors and tables by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from trace_opd.schemas.configs import ConvertConfig, TrainConfig
from trace_opd.schemas.labels import Signal
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import ANNOTATIONS
from trace_opd.tests.trace.preset_step import (
    RIGHT,
    TOKENS,
    WRONG,
    Response,
    entropy,
    gradients_of,
)
from trace_opd.trace.gates import Limits, gate_factors, limits_of

GROUP = (RIGHT, WRONG, RIGHT | {"text": "gh\nij\nkl"}, WRONG | {"text": "GH\nIJ\nKL"})
ALL = list(range(TOKENS))


def config_of(preset: str) -> TrainConfig:
    return load_config(TrainConfig, None, ["online.steps=1"], preset=preset)


@pytest.fixture(name="step_of")
def _step_of(example):
    """`(preset, step, …) -> responses`: a correct and a wrong one of a group with two of each."""

    def step_of(preset: str, step: int = 0, group=GROUP, **options) -> list[Response]:
        rows = rows_of(example(*group), preset)[:2]
        return [gradients_of(row, config_of(preset), step, **options) for row in rows]

    return step_of


def rows_of(made, preset: str) -> list[dict]:
    """The routed rows of a preset; the annotator has an idea about each wrong response."""
    annotations = made.annotations.to_pylist()
    for index, row in enumerate(annotations):
        row["reflection"] = None if row["correct"] else f"idea {index}"
    routing = load_config(ConvertConfig, None, [], preset=preset).routing
    return replace(made, annotations=ANNOTATIONS.table(annotations)).routed(routing)


def modulated(response: Response) -> torch.Tensor:
    """The advantage of each token, (tokens,)."""
    return response.advantage * response.factors


# --- divergences ---


@pytest.mark.parametrize("step", [0, 40])
def test_opsd_is_clipped_forward_kl_on_every_token(step_of, step):
    for response in step_of("opsd", step):
        assert response.routed == ALL
        assert_close(response.gradient, response.clipped_forward_kl(0.05))


def test_opsds_student_answers_directly_and_its_teacher_thinks():
    config = config_of("opsd")
    assert (config.prompt.thinking, config.prompt.teacher_thinking) == (False, True)
    assert config.online.sampling.temperature == 1.1
    assert config.teacher.temperature is None  # the sampling temperature, for both


def test_pw_opsd_weighs_later_tokens_more(step_of):
    # 0.25 + 0.75 σ((u − 0.3) / 0.1) with u = (t + ½) / 9.
    u = (torch.arange(9).double() + 0.5) / 9
    weight = 0.25 + 0.75 * torch.sigmoid((u - 0.3) / 0.1)
    assert (weight[0], weight[-1]) == (pytest.approx(0.3098, abs=1e-4), pytest.approx(0.9989, 1e-4))
    for response in step_of("pw-opsd"):
        assert_close(response.gradient, weight[:, None] * response.clipped_forward_kl(0.05))


def test_the_foreign_solution_changes_only_what_opsds_teacher_reads(example):
    opsd, control = config_of("opsd"), config_of("foreign-solution")
    assert control.loss == opsd.loss
    assert control.schedule == opsd.schedule
    made = rows_of(example(RIGHT, WRONG | {"group": "h"}), "foreign-solution")
    assert [row["teacher_context"] for row in made] == ["solution h", "solution g"]
    assert [row["route"] for row in made] == [[1] * TOKENS] * 2


@pytest.mark.parametrize(("ratio", "factor"), [(1.0, 1.0), (1.5, 1.5), (7.0, 2.0), (0.1, 0.1)])
def test_sdpos_published_form_bounds_the_ratio_by_2(step_of, ratio, factor):
    for response in step_of("sdpo-top100", ratio=ratio):
        assert_close(response.gradient, factor * response.jsd)
    right, wrong = step_of("srpo-top100", ratio=ratio)
    assert right.routed == []
    weight = factor * torch.exp(-entropy(wrong.q))[:, None]
    assert_close(wrong.gradient, weight * wrong.jsd)


def test_sdpg_adds_a_reverse_kl_to_grpo_on_correct_responses(step_of):
    right, wrong = step_of("sdpg", 1000)
    assert (right.routed, wrong.routed) == (ALL, [])
    assert_close(right.gradient, right.grpo + 1e-3 * right.reverse_kl)
    assert_close(wrong.gradient, wrong.grpo)
    config = config_of("sdpg")
    assert config.loss.reference_kl == 1e-3
    assert (config.teacher.temperature, config.teacher.sync_steps) == (1.0, 1)


def test_ssopd_adds_a_forward_kl_on_the_first_tokens_of_wrong_responses(step_of):
    right, wrong = step_of("ssopd", 1000)
    assert (right.routed, wrong.routed) == ([], [0, 1])  # α of nine tokens
    assert_close(right.gradient, right.grpo)
    expected = wrong.grpo.clone()
    expected[:2] += 0.5 * wrong.clipped_forward_kl(0.05)[:2]
    assert_close(wrong.gradient, expected)


def test_ssopds_witness_is_the_shortest_correct_peer(example):
    made = rows_of(example(RIGHT, RIGHT | {"text": "mn", "marked": ([0],)}, WRONG), "ssopd")
    assert [row["teacher_context"] for row in made] == [None, None, "mn"]


def test_rosd_corrects_wrong_responses_from_their_first_error_on(step_of):
    right, wrong = step_of("rosd")
    assert right.routed == []
    assert_close(right.gradient, torch.zeros_like(right.gradient))
    assert wrong.routed == ALL  # the first of its segments is marked
    assert_close(wrong.gradient, wrong.jsd)


def test_rosds_teacher_reads_the_reflection_and_teaches_to_the_end(example):
    late = WRONG | {"marked": ([1],)}
    _, row = rows_of(example(RIGHT, late), "rosd")
    assert row["route"] == [0] * 3 + [3] * 6
    assert row["teacher_context"] == "idea 1"


def test_antisd_ascends_the_jsd_where_the_teacher_is_undecided(step_of):
    for response in step_of("antisd", 4):
        assert_close(response.gradient, response.grpo)
    for response in step_of("antisd", 5, sure=[2, 6]):
        undecided = entropy(response.q) >= 0.1
        assert undecided.tolist() == [token not in (2, 6) for token in ALL]
        ascent = -0.5 * undecided[:, None] * response.jsd
        assert ascent.abs().max() > 0
        assert_close(response.gradient, response.grpo + ascent)


# --- tokens that matter ---

# Four tokens of the step before: entropy and divergence, nats. Their 98 % quantiles are near the
# largest ones: importance [0, 1, 1, 0.5 + 0.25 − 0.125 = 0.625] up to a few percent.
ENTROPIES, DIVERGENCES = [0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 4.0, 1.0]


def kept(preset: str, entropies: list[float], divergences: list[float]) -> list[float]:
    """Each token's factor after a step whose routed tokens are those of ENTROPIES."""
    gates = config_of(preset).loss.gates
    before = {Signal.STUDENT_ENTROPY: ENTROPIES, Signal.DIVERGENCE: DIVERGENCES}
    limits = limits_of(gates, {signal: np.array(x) for signal, x in before.items()})
    signals = {
        Signal.STUDENT_ENTROPY: torch.tensor(entropies, dtype=torch.float64),
        Signal.DIVERGENCE: torch.tensor(divergences, dtype=torch.float64),
    }
    return gate_factors(gates, signals, limits).tolist()


def test_tips_mask_on_a_table_of_entropies_and_divergences():
    # The threshold is the median importance, (0.625 + 1) / 2.
    assert kept("tip", ENTROPIES, DIVERGENCES) == [0, 1, 1, 0]
    # High entropy, large divergence, both halves together: 1 − ½ · ½ is too little, 1 − ¼ · ½ not.
    assert kept("tip", [9.0, 0.0, 1.0, 1.5], [0.0, 9.0, 2.0, 2.0]) == [1, 1, 0, 1]


def test_ta_opd_leaves_out_confident_disagreement():
    # Divergence above its 0.9 quantile, 3.1, and entropy above its median, 0.5.
    assert kept("ta-opd", [0.0, 0.4, 0.6, 2.0], [4.0, 4.0, 4.0, 3.0]) == [0, 0, 1, 0]


@pytest.mark.parametrize("preset", ["tip", "ta-opd"])
def test_the_selected_tokens_have_a_plain_reverse_kl(step_of, preset):
    thresholds = {"tip": (0.9,), "ta-opd": (0.2, 1.3)}[preset]
    limits = Limits(thresholds, entropy_max=1.6, divergence_max=1.0)
    chosen = 0
    for response in step_of(preset, limits=limits):
        assert response.routed == ALL
        kl = (response.p * (response.p / response.q).log()).sum(-1)
        h = entropy(response.p)
        if preset == "tip":
            mask = 1 - (1 - (h / 1.6).clamp(0, 1)) * (1 - kl.clamp(0, 1)) >= 0.9
        else:
            mask = (kl >= 0.2) & (h >= 1.3)
        assert_close(response.gradient, mask[:, None] * response.reverse_kl)
        chosen += int(mask.sum())
    assert 0 < chosen < 2 * TOKENS
    for response in step_of(preset):  # the first step has no limits
        assert_close(response.gradient, response.reverse_kl)


# --- advantages ---


@pytest.mark.parametrize("step", [0, 1000])
def test_rlrt_inverts_rlsds_ratio_on_correct_responses_alone(step_of, step):
    right, wrong = step_of("rlrt", step)
    assert (right.routed, wrong.routed) == (ALL, [])
    assert_close(right.factors, 0.5 + 0.5 * torch.exp(-right.gap).clamp(0, 2))
    assert_close(wrong.gradient, wrong.grpo)
    # Where RLSD's factor is above 1, RLRT's is below.
    (rlsd, _), above = step_of("rlsd"), right.factors > 1
    assert_close(rlsd.gap, right.gap)
    assert ((rlsd.factors > 1) == ~above).all()
    assert above.any()
    assert not above.all()


def test_rlcsd_adds_the_bounded_contrast_and_keeps_the_sign(step_of):
    for response in step_of("rlcsd"):
        assert response.routed == ALL
        gap = response.of(response.q).log() - response.contrast
        change = 0.5 * torch.tanh(gap / 0.02)
        change[change.abs() <= 0.02] = 0
        sign = torch.tensor(response.advantage).sign()
        expected = sign * (sign * (response.advantage + change)).clamp(min=0)
        assert_close(modulated(response), expected)
        assert (response.factors >= 0).all()
        assert response.factors.std() > 0


def test_rlcsd_is_grpo_where_both_hints_shift_a_token_alike(step_of):
    for response in step_of("rlcsd", alike=True):
        assert response.gap.abs().min() > 0  # the hint itself does shift it
        assert_close(response.gradient, response.grpo)


def test_rlcsds_hints_are_correct_and_wrong_peers(example):
    texts = [sample["text"] for sample in GROUP]
    rows = rows_of(example(*GROUP), "rlcsd")
    assert [row["teacher_context"] for row in rows] == [texts[2], texts[0], texts[0], texts[0]]
    wrong = [texts[1], texts[3]]
    assert [row["contrast_contexts"] for row in rows] == [wrong, [texts[3]], wrong, [texts[1]]]
    # The only correct and the only wrong response of a group lack a hint.
    lone = rows_of(example(RIGHT, WRONG), "rlcsd")
    assert [row["route"] for row in lone] == [[0] * TOKENS] * 2


def test_dasd_pulls_low_entropy_tokens_and_pushes_high_entropy_ones(step_of):
    limits = Limits((1.2,))
    for response in step_of("dasd", limits=limits):
        direction = torch.tanh((1.2 - entropy(response.p)) / 0.5)
        assert (direction > 0).any()
        assert (direction < 0).any()
        change = 0.5 * direction * torch.tanh(response.gap)
        sign = torch.tensor(response.advantage).sign()
        expected = sign * (sign * (response.advantage + change)).clamp(min=0)
        assert_close(modulated(response), expected)


def test_egrsd_reweights_less_where_the_teacher_is_unsure(step_of):
    for response in step_of("egrsd", sure=[1, 3, 8]):
        sureness = 0.1 + 0.9 * torch.sigmoid((0.5 - entropy(response.q)) / 0.25)
        assert sureness[[1, 3, 8]].min() > 0.8
        assert sureness.min() > 0.1
        sign = torch.tensor(response.advantage).sign()
        evidence = torch.exp(sign * response.gap).clamp(0.8, 1.2)
        assert_close(response.factors, 1 + 0.5 * sureness * (evidence - 1))


@pytest.mark.parametrize(("step", "lam"), [(0, 0.1), (25, 0.05), (50, 0.0)])
def test_amr_sd_strengthens_what_the_informed_teacher_finds_unlikely(step_of, step, lam):
    right, wrong = step_of("amr-sd", step)
    assert (right.routed, wrong.routed) == ([], ALL)
    assert_close(right.gradient, right.grpo)
    beyond = (-wrong.gap.clamp(-5, 5) - 0.5).clamp(min=0)
    assert (beyond > 0).any()
    assert (beyond == 0).any()
    assert_close(wrong.factors, 1 + lam * beyond)


def test_credit_takes_off_what_another_problems_solution_gives_as_well(step_of, example):
    two = [RIGHT, WRONG, WRONG | {"group": "h"}]
    for response in step_of("credit", group=two):
        gap = response.of(response.q).log() - response.contrast
        sign = torch.tensor(response.advantage).sign()
        expected = sign * (sign * (response.advantage + 0.5 * torch.tanh(gap))).clamp(min=0)
        assert_close(modulated(response), expected)
    row, *_ = rows_of(example(*two), "credit")
    assert row["teacher_context"] == "solution g"
    assert row["contrast_contexts"] == ["solution h"]
