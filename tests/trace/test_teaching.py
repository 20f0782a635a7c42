"""The teacher in the trainer: contrasts, its temperature, λ from a later step, limits of gates."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import (
    GateConfig,
    LossConfig,
    OfflineConfig,
    OptimConfig,
    PromptConfig,
    ScheduleConfig,
    TeacherConfig,
    TrainConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ROUTED
from trace_opd.trace.batches import rank_batches
from trace_opd.trace.checkpoint import restore, save_checkpoint
from trace_opd.trace.gates import Limits
from trace_opd.trace.identity import CHECKSUMS, TRAINER_FILE, write_checksums
from trace_opd.trace.packing import PackedModel, response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.sequences import TrainingSequence, loss_inputs, training_sequences
from trace_opd.trace.teaching import contrast_logprobs, teacher_states
from trace_opd.trace.trainer import Trainer

PROMPT = PromptConfig(privileged="{problem} {context}", student="{problem}")
# Group, reward, route and contrasts of each response.
RESPONSES = [
    ("a", 1.0, [0, 4, 4, 0, 4, 0], ["3", "12"]),
    ("a", 0.0, [4, 0, 4], ["12"]),
    ("a", 0.0, [0] * 5, None),
    ("b", 1.0, [0, 4, 0, 1], ["3", "12"]),
    ("b", 0.0, [4, 4, 2, 2, 1], ["3"]),
]
CPU = torch.device("cpu")


def fresh_policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@cache
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for index, (group, reward, route, contrasts) in enumerate(RESPONSES):
        rows.append({
            "rollout_id": f"r{index}", "problem_id": group, "group_id": group, "problem": "1+2",
            "prompt_token_ids": [5, 6, 7], "token_ids": rng.integers(10, 60, len(route)).tolist(),
            "logprobs": [-3.0] * len(route), "temperature": 0.8, "reward": reward,
            "advantage": 1.2 * reward - 0.4, "correct": reward > 0, "truncated": False,
            "route": route, "span_id": [0 if r else -1 for r in route], "diagnostic_type": None,
            "teacher_context": "4" if any(route) else None, "contrast_contexts": contrasts,
            "coverage": 0.25, "dropped_tokens": 0, "policy_name": "micro", "policy_revision": "r",
            "policy_step": 0, "vocab_fingerprint": "v",
        })  # fmt: skip
    return ROUTED.table(rows)


@cache
def sequences() -> list[TrainingSequence]:
    return training_sequences(table(), fresh_policy().tokenizer, PROMPT)


def trainer_of(policy: Policy | None = None, **fields: Any) -> Trainer:
    defaults = {"offline": OfflineConfig(steps=5), "optim": OptimConfig(lr=1e-3), "prompt": PROMPT}
    return Trainer(policy or fresh_policy(), TrainConfig(**(defaults | fields)))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- contrasts ---


def plain_logprobs(model: Any, prompt: list[int], ids: np.ndarray, heat: float) -> torch.Tensor:
    """log p of a response's tokens by transformers' own forward pass, one sequence, no packing."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
    own = torch.log_softmax(logits / heat, -1)
    return own.gather(1, torch.from_numpy(ids.astype(np.int64))[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [None, 1.7])
@pytest.mark.parametrize("budget", [10_000, 30, 1])
def test_contrasts_are_the_log_probabilities_of_a_plain_forward_pass(budget, temperature):
    policy = fresh_policy()
    eager = load_policy(resolve_policy("micro"), "cpu").model
    packed = PackedModel(policy.model)
    seen = 0
    for batch in rank_batches(sequences(), 0, 1, budget, with_teacher=True):
        inputs = loss_inputs(batch.rows, [1.0] * len(batch.rows), CPU)
        found = contrast_logprobs(packed, batch, inputs, temperature, False)
        expected = []
        for row in batch.rows:
            own = torch.zeros(len(row.token_ids))
            if row.contrast_prompt_ids:
                each = [
                    plain_logprobs(eager, ids, row.token_ids, temperature or 0.8)
                    for ids in row.contrast_prompt_ids
                ]
                mean = torch.logsumexp(torch.stack(each), 0) - math.log(len(each))
                own[row.contrast_positions] = mean[row.contrast_positions]
                seen += len(row.contrast_positions)
            expected.append(own)
        if found is None:
            assert not torch.cat(expected).any()
        else:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-5)
    assert seen == sum(route.count(4) for _, _, route, _ in RESPONSES)


def test_passes_in_step_with_another_rank_change_nothing():
    (batch,) = rank_batches(sequences(), 0, 1, 10_000, with_teacher=True)
    packed = PackedModel(fresh_policy().model)
    inputs = loss_inputs(batch.rows, [1.0] * len(batch.rows), CPU)
    more = replace(batch, teacher_passes=4, contrast_passes=5)
    calls: Counter[str] = Counter()

    def counted(*args: Any) -> Any:
        calls["passes"] += 1
        return packed(*args)

    alone, together = (contrast_logprobs(counted, b, inputs, None, False) for b in (batch, more))
    assert torch.equal(alone, together)
    assert calls["passes"] == len(batch.contrasts) + 5
    states, others = (teacher_states(counted, b)[0] for b in (batch, more))
    assert torch.equal(states, others)
    idle = replace(more, taught=[], contrasts=[])
    assert contrast_logprobs(counted, idle, inputs, None, False) is None
    assert teacher_states(counted, idle) == (None, None)


def gradients(policy: Policy, budget: int, rows: list[TrainingSequence], **fields: Any):
    trainer = trainer_of(policy, micro_batch_tokens=budget, **fields)
    sums, _ = trainer.accumulate_gradients(rows, 0.4)
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad(set_to_none=True)
    return found, sums["loss"]


BOUNDED = {"loss": LossConfig(reweight="bounded", key_weight=0.7, error_weight=-0.3)}


def test_the_gradient_with_a_contrast_does_not_depend_on_the_cut():
    policy = fresh_policy()
    policy.model.double()
    at_once, loss = gradients(policy, 1_000_000, sequences(), **BOUNDED)
    for budget in (1, 25):
        cut, cut_loss = gradients(policy, budget, sequences(), **BOUNDED)
        assert cut_loss == pytest.approx(loss, rel=1e-9)
        for name, gradient in at_once.items():
            # The model's norms round to float32.
            torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-8)


def test_a_contrast_changes_the_gradient_and_one_equal_to_the_teacher_leaves_grpo():
    policy = fresh_policy()
    reweighted = [
        replace(s, route=np.where(s.route == 4, s.route, 0).astype(np.uint8)) for s in sequences()
    ]
    plain = [replace(s, contrast_prompt_ids=()) for s in reweighted]
    equal = [
        replace(s, contrast_prompt_ids=tuple(s.teacher_prompt_ids for _ in s.contrast_prompt_ids))
        for s in reweighted
    ]
    untaught = [replace(s, route=np.zeros_like(s.route)) for s in plain]
    by_contrast, by_student, nil, grpo = (
        gradients(policy, 1_000_000, rows)[0] for rows in (reweighted, plain, equal, untaught)
    )
    name = "model.embed_tokens.weight"
    assert not torch.allclose(by_contrast[name], by_student[name], atol=1e-6)
    assert not torch.allclose(by_contrast[name], grpo[name], atol=1e-6)
    torch.testing.assert_close(nil[name], grpo[name], rtol=1e-4, atol=1e-7)


# --- λ from a later step ---


def test_before_the_start_step_nothing_is_taught_and_the_teacher_is_kept(monkeypatch):
    schedule = ScheduleConfig(start_step=2, hold_steps=1, decay_steps=1)
    trainer = trainer_of(schedule=schedule, teacher=TeacherConfig(sync="frozen"))
    passes: list[int] = []
    monkeypatch.setattr(
        "trace_opd.trace.trainer.teacher_states",
        lambda *args: passes.append(trainer.state.step) or teacher_states(*args),
    )
    metrics = list(trainer.run(lambda step: table(), None))
    assert [m["kl_weight"] for m in metrics] == [0, 0, 0.5, 0.5, 0]
    assert sorted(set(passes)) == [2, 3]
    assert trainer.teacher is None


def test_the_steps_before_the_start_step_are_plain_grpos():
    plain = trainer_of(schedule=ScheduleConfig(w0=0.0))
    later = trainer_of(schedule=ScheduleConfig(start_step=2))
    for trainer in (plain, later):
        for _ in range(2):
            rows = training_sequences(table(), trainer.policy.tokenizer, PROMPT, with_teacher=False)
            trainer.train_step(rows)
    assert same(weights(plain), weights(later))
    assert later.teacher is not None


def test_a_teacher_that_follows_is_of_the_step_at_which_it_begins():
    schedule = ScheduleConfig(start_step=3)
    trainer = trainer_of(schedule=schedule, teacher=TeacherConfig(sync_steps=2))
    known = []
    for _ in range(4):
        known.append(weights(trainer))
        trainer.train_step(sequences())
    teacher = {name.removeprefix("model."): p for name, p in trainer.teacher.named_parameters()}
    assert same(known[2], {name: p.detach() for name, p in teacher.items()})


# --- the teacher's temperature ---


def test_the_teachers_temperature_divides_its_logits_alone():
    """An FKL without clip to a teacher of the base's weights and the student's prompt."""
    rows = [
        replace(s, teacher_prompt_ids=s.prompt_ids, contrast_prompt_ids=()) for s in sequences()
    ]
    rows = [replace(s, route=np.where(s.route, 1, 0).astype(np.uint8)) for s in rows]
    loss = LossConfig(kl_clip="none")
    alike = trainer_of(loss=loss, teacher=TeacherConfig(temperature=0.8)).train_step(rows)
    warm = trainer_of(loss=loss, teacher=TeacherConfig(temperature=2.0)).train_step(rows)
    assert alike["kl_fkl"] == pytest.approx(0, abs=1e-6)
    model, total, tokens = fresh_policy().model, 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = response_logits(model, [row.prompt_ids], [row.token_ids])[row.routed_positions]
        log_q, log_p = torch.log_softmax(logits / 2.0, -1), torch.log_softmax(logits / 0.8, -1)
        total += (log_q.exp() * (log_q - log_p)).sum().item()
        tokens += len(logits)
    assert warm["kl_fkl"] == pytest.approx(total / tokens, rel=1e-4)


# --- limits of gates ---

GATED = {
    "loss": LossConfig(
        reweight="bounded",
        gates=[
            GateConfig(of="teacher_entropy", shape="below", quantile=0.6, floor=0.2),
            GateConfig(of="student_entropy", shape="rising", at=1.0),
            GateConfig(of="position", shape="above", quantile=0.3),
        ],
    ),
    "schedule": ScheduleConfig(start_step=1, hold_steps=2, decay_steps=4),
    "teacher": TeacherConfig(sync_steps=2, temperature=1.2),
}
IMPORTANT = LossConfig(gates=[GateConfig(of="importance", shape="above", quantile=0.5)])


def divergent() -> list[TrainingSequence]:
    """The responses with divergences in place of reweighted tokens."""
    kinds = np.array([0, 1, 2, 3, 2], np.uint8)
    return [replace(s, route=kinds[s.route], contrast_prompt_ids=()) for s in sequences()]


@pytest.mark.parametrize("budget", [10_000, 25])
def test_the_limits_are_the_quantiles_of_the_last_taught_steps_routed_tokens(budget):
    trainer = trainer_of(**GATED, micro_batch_tokens=budget)
    trainer.train_step(sequences())
    assert trainer.state.limits is None  # λ was 0
    trainer.train_step(sequences())
    routed = [s for s in sequences() if s.routed_end]
    with torch.no_grad():
        logits = response_logits(
            trainer_of().teacher.model,  # synchronised at step 0: the base
            [s.teacher_prompt_ids for s in routed],
            [s.token_ids for s in routed],
            [s.routed_positions for s in routed],
        )
    log_q = torch.log_softmax(logits / 1.2, -1)
    entropies = -(log_q.exp() * log_q).sum(-1)
    places = np.concatenate([(s.routed_positions + 0.5) / len(s.token_ids) for s in routed])
    limits = trainer.state.limits
    entropy, none, place = limits.thresholds
    assert entropy == pytest.approx(np.quantile(entropies.numpy(), 0.6), rel=1e-4)
    assert place == pytest.approx(np.quantile(places, 0.3), rel=1e-6)
    assert none is None
    assert (limits.entropy_max, limits.divergence_max) == (None, None)


def test_importance_keeps_its_maxima_and_no_gate_keeps_nothing():
    trainer = trainer_of(loss=IMPORTANT)
    trainer.train_step(divergent())
    limits = trainer.state.limits
    assert limits.divergence_max > 0
    assert limits.entropy_max > 0
    assert 0 < limits.thresholds[0] <= 1
    plain = trainer_of(loss=LossConfig(gates=[GateConfig(of="position", shape="above", at=0.3)]))
    plain.train_step(divergent())
    assert plain.state.limits is None


def test_a_step_without_routed_tokens_or_a_finite_gradient_leaves_the_limits():
    trainer = trainer_of(loss=IMPORTANT)
    trainer.train_step(divergent())
    known = trainer.state.limits
    plain = [replace(s, route=np.zeros_like(s.route)) for s in divergent()]
    trainer.train_step(plain)
    assert trainer.state.limits is known
    trainer.train_step([replace(s, advantage=math.inf) for s in divergent()])
    assert (trainer.state.skipped, trainer.state.limits) == (1, known)


@pytest.mark.parametrize("until", [1, 2, 3])
def test_a_run_with_contrast_gates_and_start_step_resumes_to_the_bit(tmp_path, until):
    straight = trainer_of(**GATED)
    expected = list(straight.run(lambda step: table(), None))
    stopped = trainer_of(**GATED)
    for _ in range(until):
        next(iter(stopped.run(lambda step: table(), None)))
    folder = save_checkpoint(stopped, tmp_path)
    resumed = trainer_of(**GATED)
    restore(resumed, folder)
    assert resumed.state == stopped.state
    assert (resumed.state.limits is None) == (until == 1)
    rest = list(resumed.run(lambda step: table(), None))
    assert same(weights(resumed), weights(straight))
    assert resumed.state == straight.state
    for one, other in zip(rest, expected[until:], strict=True):
        assert {n: v for n, v in one.items() if "second" not in n and "mib" not in n} == {
            n: v for n, v in other.items() if "second" not in n and "mib" not in n
        }


def changed_state(folder: Path, **fields: Any) -> None:
    saved = json.loads((folder / TRAINER_FILE).read_text())
    state = saved["state"] | fields
    saved["state"] = {name: value for name, value in state.items() if value is not ...}
    (folder / TRAINER_FILE).write_text(json.dumps(saved))
    (folder / CHECKSUMS).unlink()
    write_checksums(folder)


def test_a_checkpoint_without_limits_resumes_as_an_older_one_does(tmp_path):
    trainer = trainer_of(**GATED)
    for _ in range(2):
        trainer.train_step(sequences())
    folder = save_checkpoint(trainer, tmp_path)
    changed_state(folder, limits=...)
    older = trainer_of(**GATED)
    restore(older, folder)
    assert older.state == replace(trainer.state, limits=None)
    plain = trainer_of()
    plain.train_step(sequences())
    names = json.loads((save_checkpoint(plain, tmp_path) / TRAINER_FILE).read_text())["state"]
    assert names.keys() == {"step", "kl_exposure", "skipped_in_a_row", "skipped"}


@pytest.mark.parametrize(
    "limits",
    [
        {"thresholds": [0.5, None], "entropy_max": None, "divergence_max": None},
        {"thresholds": [0.5, 0.5, 0.5], "entropy_max": None, "divergence_max": None},
        {"thresholds": [math.nan, None, 0.5], "entropy_max": None, "divergence_max": None},
        {"thresholds": [0.5, None, 0.5], "entropy_max": "x", "divergence_max": None},
        {"thresholds": [0.5, None, 0.5]},
        7,
    ],
)
def test_limits_of_other_gates_or_of_no_number_are_refused(tmp_path, limits):
    trainer = trainer_of(**GATED)
    for _ in range(2):
        trainer.train_step(sequences())
    folder = save_checkpoint(trainer, tmp_path)
    changed_state(folder, limits=limits)
    with pytest.raises(InputError, match="is no state of this training run"):
        restore(trainer_of(**GATED), folder)


def test_limits_reach_the_loss(monkeypatch):
    """A gate that the limits close leaves the reweighted tokens to GRPO."""
    closing = Limits((-1.0, None, 2.0))
    gates = [
        GateConfig(of="teacher_entropy", shape="below", quantile=0.6),
        GateConfig(of="student_entropy", shape="above", at=0.0),
        GateConfig(of="position", shape="above", quantile=0.3),
    ]
    found = []
    for limits in (None, closing):
        trainer = trainer_of(loss=LossConfig(gates=gates, reweight="bounded"))
        trainer.state.limits = limits
        found.append(trainer.train_step(sequences())["loss"])
    assert found[0] != pytest.approx(found[1], rel=1e-4)
