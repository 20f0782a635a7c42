"""The trainer's options on synthetic routed tables: normalisation, skipped steps, syncs, stops."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import (
    LossConfig,
    OfflineConfig,
    OnlineConfig,
    OptimConfig,
    PromptConfig,
    ScheduleConfig,
    TeacherConfig,
    TrainConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ROUTED
from trace_opd.trace.packing import response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.sequences import TrainingSequence, training_sequences
from trace_opd.trace.trainer import Metrics, Stopped, Trainer

PROMPT = PromptConfig(teacher="{problem} {diagnostic_type}")
# Group, reward and route of each response: two groups with signal, one without.
RESPONSES = [
    ("a", 1.0, [0, 1, 1, 0, 0, 3]), ("a", 0.0, [2, 0, 0]), ("a", 0.0, [0] * 9),
    ("b", 1.0, [0, 4, 0, 1]), ("b", 0.0, [0, 0, 2, 2, 3]),
    ("c", 0.0, [0, 0, 0, 1]), ("c", 0.0, [0, 0]),
]  # fmt: skip


def fresh_policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@cache
def table() -> pa.Table:
    """RESPONSES with random tokens; their log-probabilities are near micro's."""
    rng = np.random.default_rng(0)
    model = fresh_policy().model
    rows = []
    for index, (group, reward, route) in enumerate(RESPONSES):
        prompt, tokens = [5, 6, 7, 8 + ord(group) % 7], rng.integers(10, 60, len(route))
        with torch.no_grad():
            log_p = torch.log_softmax(response_logits(model, [prompt], [tokens]), -1)
        own = log_p.gather(1, torch.from_numpy(tokens)[:, None]).squeeze(1).numpy()
        rows.append({
            "rollout_id": f"r{index}", "problem_id": group, "group_id": group, "problem": "1+2",
            "prompt_token_ids": prompt, "token_ids": tokens.tolist(),
            "logprobs": own + rng.normal(0, 0.05, len(route)), "temperature": 1.0,
            "reward": reward, "advantage": 1.2 * reward - 0.4, "correct": reward > 0,
            "truncated": False, "route": route, "span_id": [0 if r else -1 for r in route],
            "diagnostic_type": "counting", "teacher_context": None, "coverage": 0.25,
            "dropped_tokens": 0, "policy_name": "micro", "policy_revision": "r", "policy_step": 0,
            "vocab_fingerprint": "v",
        })  # fmt: skip
    return ROUTED.table(rows)


@cache
def sequences() -> list[TrainingSequence]:
    return training_sequences(table(), fresh_policy().tokenizer, PROMPT)


def trainer_of(policy: Policy | None = None, **fields: Any) -> Trainer:
    defaults = {"offline": OfflineConfig(steps=3), "optim": OptimConfig(lr=1e-3), "prompt": PROMPT}
    return Trainer(policy or fresh_policy(), TrainConfig(**(defaults | fields)))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- normalisation ---

AGGREGATIONS = {
    "sequence": lambda lengths: [1 / (len(lengths) * n) for n in lengths],
    "token": lambda lengths: [1 / sum(lengths)] * len(lengths),
    "constant": lambda lengths: [1 / (len(lengths) * 50)] * len(lengths),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_sum_to_the_whole_step(aggregation):
    policy = fresh_policy()
    policy.model.double()
    loss = LossConfig(aggregation=aggregation, constant_length=50)
    found = []
    for budget in (10_000, 30, 1):
        trainer = trainer_of(policy, loss=loss, micro_batch_tokens=budget)
        sums, _ = trainer.accumulate_gradients(sequences(), 0.3)
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        policy.model.zero_grad(set_to_none=True)
        found.append((sums["loss"], gradient))
    (loss_of_step, gradient), *cut = found
    assert gradient.norm() > 1e-3
    for part, part_gradient in cut:
        assert part == pytest.approx(loss_of_step, rel=1e-9)
        assert (part_gradient - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize(("aggregation", "expected"), AGGREGATIONS.items())
def test_a_steps_loss_is_the_weighted_sum_of_its_tokens(aggregation, expected):
    """At λ = 0 and ratios inside the clip: −Σ_y w_y Σ_t ρ_t A."""
    policy = fresh_policy()
    loss = LossConfig(aggregation=aggregation, constant_length=50, clip_low=0.9, clip_high=9.0)
    trainer = trainer_of(policy, loss=loss, micro_batch_tokens=30)
    sums, _ = trainer.accumulate_gradients(sequences(), 0.0)
    total = 0.0
    shares = expected([len(s.token_ids) for s in sequences()])
    for sequence, share in zip(sequences(), shares, strict=True):
        with torch.no_grad():
            logits = response_logits(policy.model, [sequence.prompt_ids], [sequence.token_ids])
        ids = torch.from_numpy(sequence.token_ids)[:, None]
        own = torch.log_softmax(logits, -1).gather(1, ids).squeeze(1)
        ratio = (own - torch.from_numpy(sequence.logprobs)).exp()
        total -= share * sequence.advantage * ratio.sum().item()
    assert sums["loss"] == pytest.approx(total, rel=1e-4)


# --- groups without signal ---


def test_groups_without_signal_are_counted_and_left_out_on_request():
    kept = [s for s in sequences() if s.group_id != "c"]
    dropping, keeping = trainer_of(drop_groups_without_signal=True), trainer_of()
    metrics = dropping.train_step(sequences())
    assert metrics["groups_without_signal"] == pytest.approx(1 / 3)
    assert keeping.train_step(sequences())["groups_without_signal"] == pytest.approx(1 / 3)
    by_hand = trainer_of()
    assert by_hand.train_step(kept)["loss"] == metrics["loss"]
    assert same(weights(dropping.policy.model), weights(by_hand.policy.model))
    assert not same(weights(dropping.policy.model), weights(keeping.policy.model))


def test_a_step_without_any_signal_is_done_and_changes_nothing():
    silent = [s for s in sequences() if s.group_id == "c"]
    decay = OptimConfig(lr=1e-3, weight_decay=0.5)
    trainer = trainer_of(drop_groups_without_signal=True, optim=decay)
    before = weights(trainer.policy.model)
    metrics = trainer.train_step(silent)
    assert (metrics["loss"], metrics["grad_norm"], metrics["steps_skipped"]) == (0, 0, 0)
    assert metrics["groups_without_signal"] == 1
    assert trainer.state.step == 1
    assert same(weights(trainer.policy.model), before)


# --- gradients that are not finite ---


def broken() -> list[TrainingSequence]:
    first, *rest = sequences()
    return [replace(first, advantage=math.nan), *rest]


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted():
    trainer = trainer_of(teacher=TeacherConfig(sync="ema"))
    trainer.train_step(sequences())
    before, teacher = weights(trainer.policy.model), weights(trainer.teacher)
    moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
    metrics = trainer.train_step(broken())
    assert all(math.isfinite(value) for value in metrics.values())
    assert "grad_norm" not in metrics
    assert metrics["steps_skipped"] == 1
    assert (trainer.state.step, trainer.state.skipped_in_a_row) == (2, 1)
    assert same(weights(trainer.policy.model), before)
    assert same(weights(trainer.teacher), teacher)
    after = [s["exp_avg"] for s in trainer.optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(moments, after, strict=True))
    assert all(p.grad is None for p in trainer.policy.model.parameters())


def test_a_finite_step_afterwards_is_what_it_would_have_been():
    disturbed, straight = trainer_of(), trainer_of()
    disturbed.train_step(broken())
    for trainer in (disturbed, straight):
        trainer.train_step(sequences())
    assert disturbed.state.skipped_in_a_row == 0
    assert disturbed.state.skipped == 1
    assert same(weights(disturbed.policy.model), weights(straight.policy.model))


def test_a_broken_weight_is_not_spread_to_the_others():
    trainer = trainer_of()
    name, parameter = next(iter(trainer.policy.model.named_parameters()))
    before = weights(trainer.policy.model)
    with torch.no_grad():
        parameter[:] = math.nan
    assert trainer.train_step(sequences())["steps_skipped"] == 1
    after = weights(trainer.policy.model)
    del before[name], after[name]
    assert same(after, before)


@pytest.mark.parametrize("allowed", [0, 2])
def test_too_many_consecutive_skips_stop_the_run(allowed):
    trainer = trainer_of(optim=OptimConfig(max_skipped_steps=allowed))
    for _ in range(allowed):
        trainer.train_step(broken())
    trainer.train_step(sequences())  # only consecutive skips count: a finite step resets the count
    for _ in range(allowed):
        trainer.train_step(broken())
    with pytest.raises(InputError, match=rf"not finite {allowed + 1} times in a row"):
        trainer.train_step(broken())


# --- frozen copies ---


def test_an_ema_teacher_moves_by_its_rate_after_each_step():
    trainer = trainer_of(teacher=TeacherConfig(sync="ema", ema_rate=0.25))
    expected = weights(trainer.teacher)
    for _ in range(3):
        trainer.train_step(sequences())
        student = weights(trainer.student)
        expected = {name: 0.75 * expected[name] + 0.25 * student[name] for name in expected}
        for name, value in weights(trainer.teacher).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_a_frozen_teacher_stays_the_base_policy():
    trainer = trainer_of(teacher=TeacherConfig(sync="frozen", sync_steps=1))
    base = weights(trainer.teacher)
    for _ in range(2):
        trainer.train_step(sequences())
    assert same(weights(trainer.teacher), base)
    assert not same(weights(trainer.student), base)


def test_a_periodic_teacher_is_the_student_of_its_last_sync():
    trainer = trainer_of(teacher=TeacherConfig(sync="periodic", sync_steps=2))
    students = []
    for _ in range(4):
        students.append(weights(trainer.student))
        trainer.train_step(sequences())
        assert same(weights(trainer.teacher), students[len(students) - 1 & ~1])


def test_the_kl_to_the_base_policy_is_0_at_first_and_then_measures_the_distance_from_it():
    fields = {"schedule": ScheduleConfig(w0=0.0), "optim": OptimConfig(lr=1e-5)}
    trainer = trainer_of(loss=LossConfig(reference_kl=0.1), **fields)
    base = weights(trainer.reference)
    distances = [trainer.train_step(sequences())["kl_reference"] for _ in range(3)]
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert 1e-5 < distances[1] < distances[2] < 1
    assert same(weights(trainer.reference), base)
    plain = trainer_of(**fields)
    assert plain.reference is None
    assert "kl_reference" not in plain.train_step(sequences())


# --- stopping ---


class Rollouts:
    """A source of online steps that announces two phases."""

    def collect(
        self, step: int, with_teacher: bool, phase: Callable[[str], None]
    ) -> tuple[pa.Table, dict[str, int]]:
        phase("sample")
        phase("verify")
        return table(), {}


def resumable(online: bool) -> Trainer:
    steps = {"online": OnlineConfig(steps=3)} if online else {"offline": OfflineConfig(steps=3)}
    # The teacher is released after the second step.
    schedule = ScheduleConfig(hold_steps=2, decay_steps=0)
    defaults = {"offline": OfflineConfig(), "teacher": TeacherConfig(sync_steps=1)}
    return trainer_of(schedule=schedule, **(defaults | steps))


def run(trainer: Trainer, asked: int | None = None) -> list[Metrics]:
    """Metrics of the steps until the `asked`-th call of `stopping`."""
    calls, metrics = 0, []

    def stopping() -> bool:
        nonlocal calls
        calls += 1
        return calls == asked

    try:
        metrics.extend(trainer.run(lambda step: table(), Rollouts(), stopping))
    except Stopped:
        assert asked is not None
    return metrics


@cache
def undisturbed(online: bool) -> tuple[list[dict], list[Metrics]]:
    """The weights before each step and at the end, and each step's metrics."""
    trainer = resumable(online)
    states, metrics = [weights(trainer.policy.model)], []
    for step in trainer.run(lambda step: table(), Rollouts()):
        metrics.append(step)
        states.append(weights(trainer.policy.model))
    return states, metrics


@pytest.mark.parametrize(
    ("online", "asked"),
    # `stopping` is called before each step and at the start of each phase.
    [(False, n) for n in (1, *range(6, 12))] + [(True, n) for n in range(7, 14)],
)
def test_a_stop_leaves_the_last_finished_step_and_the_rest_runs_as_if_undisturbed(online, asked):
    states, expected = undisturbed(online)
    trainer = resumable(online)
    done = run(trainer, asked)
    assert trainer.state.step == trainer.policy.info.step == len(done)
    assert len(done) == (asked - 1) // (6 if online else 5)
    assert same(weights(trainer.policy.model), states[len(done)])
    done += run(trainer)
    assert same(weights(trainer.policy.model), states[-1])
    for name in ("step", "phase", "loss", "grad_norm", "kl_weight", "kl_exposure"):
        assert [m[name] for m in done] == [m[name] for m in expected]
