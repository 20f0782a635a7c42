"""The trainer on the bundled micro policy: gradients, teacher, privilege boundary, checkpoints."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.bundled.demonstrations import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.bundled.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import (
    LossConfig,
    OfflineConfig,
    OnlineConfig,
    OptimConfig,
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SamplingConfig,
    ScheduleConfig,
    SegmentConfig,
    TeacherConfig,
    TrainConfig,
)
from trace_opd.schemas.labels import DiagnosticType, KlClip, Route
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS
from trace_opd.trace.align import byte_table
from trace_opd.trace.checkpoint import restore, save_checkpoint, save_model
from trace_opd.trace.export import export_model
from trace_opd.trace.metrics import step_metrics
from trace_opd.trace.online import OnlineSource
from trace_opd.trace.packing import response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import render_chat, teacher_messages
from trace_opd.trace.retention import checkpoints
from trace_opd.trace.routed import routed_table
from trace_opd.trace.sequences import TrainingSequence, training_sequences
from trace_opd.trace.trainer import Trainer

PROMPT = PromptConfig(student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE)
SAMPLING = SamplingConfig(temperature=0.9, max_new_tokens=96)
ROUTING = RoutingConfig(key=Route.FKL, error=Route.RKL)


@dataclass(frozen=True)
class Tables:
    problems: pa.Table
    rollouts: pa.Table
    verdicts: pa.Table
    annotations: pa.Table

    def routed(self) -> pa.Table:
        tables = (self.problems, self.rollouts, self.verdicts, self.annotations)
        return routed_table(*tables, byte_table(fresh_policy().tokenizer), ROUTING)


def fresh_policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


def annotator() -> StepsAnnotator:
    return StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())


@cache
def tables(seed: int = 0) -> Tables:
    """Three problems with four responses of micro each."""
    policy = fresh_policy()
    problems = arithmetic_problems(3, seed)
    sampler = TransformersPolicySampler(policy, 32_768)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, PROMPT, SAMPLING, 4, seed)
    verdicts = exact_verdicts(problems, rollouts)
    annotations = annotator().annotate(problems, rollouts, verdicts)
    return Tables(problems, rollouts, verdicts, annotations)


@cache
def sequences(seed: int = 0) -> list[TrainingSequence]:
    return training_sequences(tables(seed).routed(), fresh_policy().tokenizer, PROMPT)


def trainer_of(policy: Policy | None = None, **fields) -> Trainer:
    defaults = {
        "prompt": PROMPT,
        "offline": OfflineConfig(steps=6),
        "optim": OptimConfig(lr=1e-4),
        "micro_batch_tokens": 4096,
    }
    return Trainer(policy or fresh_policy(), TrainConfig(**(defaults | fields)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@contextmanager
def forwards_of(trainer: Trainer) -> Iterator[Counter[str]]:
    """Counts forward passes: `student`, and everything else of its class as `teacher`."""
    counts: Counter[str] = Counter()
    student = trainer.policy.model.base_model

    def count(module: torch.nn.Module, _: object) -> None:
        if type(module) is type(student):
            counts["student" if module is student else "teacher"] += 1

    handle = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def test_the_sample_holds_every_route_and_reward():
    """The tests below depend on this."""
    routes = {int(r) for s in sequences() for r in np.unique(s.route)}
    assert routes == {Route.GRPO, Route.FKL, Route.RKL}
    assert {s.reward for s in sequences()} == {0.0, 1.0}
    assert any(s.advantage for s in sequences())


# --- gradients ---


def gradients(policy: Policy, budget: int, kl: float) -> tuple[dict[str, torch.Tensor], float]:
    trainer = trainer_of(policy, micro_batch_tokens=budget)
    sums, _ = trainer.accumulate_gradients(sequences(), kl)
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad(set_to_none=True)
    return found, sums["loss"]


@pytest.mark.parametrize(
    ("kl", "dtype", "rtol", "atol"),
    [
        # The model's norms round to float32; a shared prompt's gradient is rounded once.
        (0.3, torch.float64, 1e-6, 1e-9),
        (0.3, torch.float32, 1e-3, 1e-6),
        (0.0, torch.float64, 1e-6, 1e-9),
    ],
)
def test_the_gradient_does_not_depend_on_the_micro_batch_budget(kl, dtype, rtol, atol):
    policy = fresh_policy()
    policy.model.to(dtype)
    at_once, loss = gradients(policy, 1_000_000, kl)
    assert any(gradient.abs().max() > 1e-4 for gradient in at_once.values())
    for budget in (1, 250, 600):
        cut, cut_loss = gradients(policy, budget, kl)
        assert cut_loss == pytest.approx(loss, rel=max(rtol, 1e-9), abs=atol)
        for name, gradient in at_once.items():
            torch.testing.assert_close(cut[name], gradient, rtol=rtol, atol=atol)


def test_the_gradient_does_not_depend_on_the_order_of_sequences():
    policy = fresh_policy()
    policy.model.double()
    trainer = trainer_of(policy)
    found = []
    for order in (sequences(), sequences()[::-1]):
        trainer.accumulate_gradients(order, 0.3)
        found.append(policy.model.get_input_embeddings().weight.grad.clone())
        policy.model.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_the_samplers_log_probabilities_are_the_trainers(temperature):
    policy = fresh_policy()
    sampling = SamplingConfig(temperature=temperature, top_p=0.9, top_k=5, max_new_tokens=96)
    sampler = TransformersPolicySampler(policy, 1000)
    rollouts = rollouts_table(
        arithmetic_problems(3, 1), sampler, policy.tokenizer, PROMPT, sampling, 2, 0
    ).to_pylist()
    responses = [np.array(row["token_ids"]) for row in rollouts]
    with torch.no_grad():
        logits = response_logits(
            policy.model,
            [row["prompt_token_ids"] for row in rollouts],
            responses,
            [np.arange(len(ids)) for ids in responses],
        )
    log_p = torch.log_softmax(logits / (temperature or 1.0), -1)
    ids = torch.from_numpy(np.concatenate(responses))
    expected = log_p.gather(-1, ids[:, None]).squeeze(-1)
    sampled = torch.tensor([x for row in rollouts for x in row["logprobs"]])
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-4)


def test_on_fresh_rollouts_nothing_drifts_and_no_ratio_is_clipped():
    metrics = trainer_of().train_step(sequences())
    assert metrics["sampler_drift"] < 1e-5
    assert metrics["ratio_clipped"] == 0


def test_a_step_of_grpo_makes_right_responses_likelier_than_wrong_ones():
    trainer = trainer_of(schedule=ScheduleConfig(w0=0.0))
    model = trainer.policy.model

    @torch.no_grad()
    def gain() -> float:
        logits = response_logits(
            model,
            [s.prompt_ids for s in sequences()],
            [s.token_ids for s in sequences()],
            [np.arange(len(s.token_ids)) for s in sequences()],
        )
        ids = torch.from_numpy(np.concatenate([s.token_ids for s in sequences()]))
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, None]).squeeze(-1)
        share = [np.full(len(s.token_ids), s.advantage / len(s.token_ids)) for s in sequences()]
        return (logprobs * torch.from_numpy(np.concatenate(share))).sum().item()

    before = gain()
    trainer.train_step(sequences())
    assert gain() > before


def test_without_a_clip_steps_of_kl_alone_bring_the_student_to_the_teacher():
    silent = [replace(s, advantage=0.0) for s in sequences()]
    trainer = trainer_of(teacher=TeacherConfig(sync_steps=99), loss=LossConfig(kl_clip=KlClip.NONE))
    steps = [trainer.train_step(silent) for _ in range(5)]
    assert steps[-1]["kl_fkl"] < 0.5 * steps[0]["kl_fkl"]
    assert steps[-1]["kl_rkl"] < 0.5 * steps[0]["kl_rkl"]


# --- the teacher ---


def test_no_teacher_is_held_or_run_once_lambda_is_0():
    trainer = trainer_of(schedule=ScheduleConfig(hold_steps=1, decay_steps=2))
    seen, exposure = [], []
    for _ in range(5):
        with forwards_of(trainer) as counts:
            metrics = trainer.train_step(sequences())
        seen.append((metrics["kl_weight"], counts["teacher"], trainer.teacher is None))
        exposure.append(metrics["kl_exposure"])
        assert counts["student"] == 1
    assert seen[:3] == [(0.5, 1, False), (0.5, 1, False), (0.25, 1, False)]
    assert seen[3:] == [(0.0, 0, True)] * 2
    assert exposure == [0.25, 0.5, 0.5625, 0.5625, 0.5625]  # Σ λ²


def test_the_teacher_does_not_run_for_sequences_without_routed_tokens():
    plain = [replace(s, route=np.zeros_like(s.route)) for s in sequences()]
    trainer = trainer_of()
    with forwards_of(trainer) as counts:
        trainer.train_step(plain)
    assert (counts["student"], counts["teacher"]) == (1, 0)


def test_the_teacher_is_synced_exactly_every_so_many_steps():
    trainer = trainer_of(teacher=TeacherConfig(sync_steps=2))
    synced = {}
    for step in range(5):
        before = weights(trainer.policy.model)
        trainer.train_step(sequences())
        assert not same_weights(weights(trainer.policy.model), before)
        if step % 2 == 0:
            synced = before
        assert same_weights(weights(trainer.teacher.model), synced)


def test_the_teacher_is_frozen():
    trainer = trainer_of()
    trainer.train_step(sequences())
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())


def test_the_learning_rate_warms_up_linearly():
    trainer = trainer_of(optim=OptimConfig(lr=4e-4, warmup_steps=2))
    rates = [trainer.train_step(sequences())["lr"] for _ in range(3)]
    assert rates == pytest.approx([2e-4, 4e-4, 4e-4])


# --- online ---


class ExactVerifier:
    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        return exact_verdicts(problems, rollouts)

    def close(self) -> None:
        """Nothing to release."""


class CountingAnnotator:
    """The rule annotator with a count of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        self.calls += 1
        return annotator().annotate(problems, rollouts, verdicts)

    def close(self) -> None:
        """Nothing to release."""


def test_online_steps_sample_from_the_current_weights_and_stop_annotating_at_lambda_0():
    trainer = trainer_of(
        offline=OfflineConfig(steps=1),
        online=OnlineConfig(steps=4),
        schedule=ScheduleConfig(hold_steps=2, decay_steps=1),
    )
    policy, marker, written = trainer.policy, CountingAnnotator(), {}
    sampler = TransformersPolicySampler(policy, 32_768)
    online = OnlineSource(
        problems=lambda step, refill: arithmetic_problems(2, step),
        sample=lambda problems, step: rollouts_table(
            problems, sampler, policy.tokenizer, PROMPT, SAMPLING, 4, step
        ),
        verifier=ExactVerifier(),
        annotator=marker,
        bytes=byte_table(policy.tokenizer),
        routing=ROUTING,
        write=written.__setitem__,
    )
    metrics = list(trainer.run(lambda step: tables().routed(), online))
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["phase"] for m in metrics] == ["offline"] + ["online"] * 4
    assert [m["kl_weight"] for m in metrics] == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert marker.calls == 2
    assert sorted(written) == [1, 2, 3, 4]
    assert ["annotations" in written[step] for step in sorted(written)] == [
        True,
        True,
        False,
        False,
    ]
    for step, made in written.items():
        assert set(made["rollouts"]["policy_step"].to_pylist()) == {step}
        assert metrics[step]["sampler_drift"] < 1e-4
    routed_tokens = [
        sum(sum(map(bool, route)) for route in written[step]["routed"]["route"].to_pylist())
        for step in sorted(written)
    ]
    assert routed_tokens[0] > 0
    assert routed_tokens[2:] == [0, 0]
    for phase in ("sample", "verify", "annotate", "route", "train"):
        assert metrics[1][f"seconds_{phase}"] > 0
    assert metrics[1]["seconds"] >= metrics[1]["seconds_train"]


# --- the privilege boundary ---


def test_the_teachers_prompt_is_the_problem_and_the_label():
    tokenizer = fresh_policy().tokenizer
    rows = tables().routed().to_pylist()
    routed = [(r, s) for r, s in zip(rows, sequences(), strict=True) if any(r["route"])]
    assert len(routed) > 1
    for row, sequence in routed:
        prompt = tokenizer.decode(sequence.teacher_prompt_ids)
        hint = f"{row['problem']}\nhint: {row['diagnostic_type']}"
        assert prompt == f"<|user|>{hint}<|assistant|>"


def test_answers_solutions_and_what_annotators_write_do_not_reach_the_routed_table():
    known = tables()
    problems = [
        row | {"answer": "SECRET", "solution": "SECRET", "steps": None}
        for row in known.problems.to_pylist()
    ]
    annotations = [
        row
        | {"raw_answer": "SECRET", "error": "SECRET", "annotator_name": "SECRET"}
        | {"spans": [span | {"text": "SECRET"} for span in row["spans"]]}
        for row in known.annotations.to_pylist()
    ]
    changed = replace(
        known, problems=PROBLEMS.table(problems), annotations=ANNOTATIONS.table(annotations)
    )
    assert changed.routed() == known.routed()


def test_span_positions_do_not_reach_the_teachers_prompt():
    routed = tables().routed()
    moved = [
        row | {name: row[name][::-1] for name in ("route", "span_id")}
        | {"coverage": 1.0, "dropped_tokens": 9, "advantage": 7.0, "reward": 0.5, "correct": False}
        for row in routed.to_pylist()
    ]  # fmt: skip
    tokenizer = fresh_policy().tokenizer
    other = training_sequences(pa.Table.from_pylist(moved, routed.schema), tokenizer, PROMPT)
    assert [s.route.tolist() for s in other] != [s.route.tolist() for s in sequences()]
    assert [s.teacher_prompt_ids for s in other] == [s.teacher_prompt_ids for s in sequences()]


def test_only_the_label_changes_the_teachers_prompt():
    routed = tables().routed()
    relabelled = [
        row | {"diagnostic_type": row["diagnostic_type"] and DiagnosticType.SETUP}
        for row in routed.to_pylist()
    ]
    tokenizer = fresh_policy().tokenizer
    other = training_sequences(pa.Table.from_pylist(relabelled, routed.schema), tokenizer, PROMPT)
    for row, sequence in zip(relabelled, other, strict=True):
        if sequence.teacher_prompt_ids is not None:
            expected = teacher_messages(PROMPT, row["problem"], DiagnosticType.SETUP)
            assert sequence.teacher_prompt_ids == render_chat(tokenizer, expected)


def test_a_label_outside_the_enumeration_stops_before_the_teacher():
    row = next(r for r in tables().routed().to_pylist() if any(r["route"]))
    forged = pa.Table.from_pylist([row | {"diagnostic_type": "the sum is 12"}])
    with pytest.raises(ValueError, match="is not a valid DiagnosticType"):
        training_sequences(forged, fresh_policy().tokenizer, PROMPT)


def test_the_teacher_reads_its_prompt_and_the_prefix_up_to_the_last_routed_token_only():
    trainer, read = trainer_of(micro_batch_tokens=1), []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        read.append(kwargs["input_ids"][0].tolist())

    trainer.teacher.model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.accumulate_gradients(sequences(), 0.5)
    expected = [
        [*s.teacher_prompt_ids, *s.token_ids[: np.flatnonzero(s.route)[-1] + 1].tolist()]
        for s in sequences()
        if s.route.any()
    ]
    assert sorted(read) == sorted(expected)


@pytest.mark.parametrize("budget", [100, 400])
def test_the_teachers_rows_are_cut_by_tokens_when_its_prompts_are_long(budget):
    long = [
        replace(s, teacher_prompt_ids=5 * s.teacher_prompt_ids) if s.routed_end else s
        for s in sequences()
    ]
    trainer, read = trainer_of(micro_batch_tokens=budget), []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        read.append((kwargs["input_ids"].numel(), len(kwargs["packed"].sequences)))

    trainer.teacher.model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.accumulate_gradients(long, 0.5)
    cut = gradients_of(trainer)
    assert sum(count for _, count in read) == sum(s.routed_end > 0 for s in long)
    assert all(tokens <= budget or count == 1 for tokens, count in read)
    at_once = trainer_of(micro_batch_tokens=1_000_000)
    at_once.accumulate_gradients(long, 0.5)
    for name, gradient in gradients_of(at_once).items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-3, atol=1e-6)


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.policy.model.named_parameters()}


# --- checkpoints ---


def step_table(step: int) -> pa.Table:
    """A different set of groups in each step."""
    routed = tables(0).routed()
    groups = list(dict.fromkeys(routed["group_id"].to_pylist()))
    left_out = groups[step % len(groups)]
    return routed.filter(pc.not_equal(routed["group_id"], left_out))


WARM_UP = OptimConfig(lr=3e-4, warmup_steps=5)
DECAY = OptimConfig(kind="adamw_8bit", lr=3e-4, schedule="cosine")


@pytest.mark.parametrize(
    ("schedule", "optim"),
    [
        (ScheduleConfig(), WARM_UP),
        (ScheduleConfig(hold_steps=1, decay_steps=1), WARM_UP),
        (ScheduleConfig(w0=0), DECAY),
    ],
    ids=["with a teacher", "lambda 0", "8 bits and a falling learning rate"],
)
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(tmp_path, schedule, optim):
    # The teacher syncs at steps 0 and 4, so at step 3 it is older than the student.
    fields = {"schedule": schedule, "teacher": TeacherConfig(sync_steps=4), "optim": optim}
    straight = trainer_of(**fields)
    metrics = list(straight.run(step_table, None))

    first = trainer_of(**fields)
    stopped = first.run(step_table, None)
    for _ in range(3):
        next(stopped)
    saved = save_checkpoint(first, tmp_path)
    assert (saved.name, checkpoints(tmp_path)) == ("step-00003", [saved])

    second = trainer_of(**fields)
    restore(second, saved)
    assert second.policy.info.step == 3
    resumed = list(second.run(step_table, None))

    assert [m["step"] for m in resumed] == [3, 4, 5]
    for name in ("loss", "grad_norm", "lr", "kl_weight", "kl_exposure", "entropy"):
        assert [m[name] for m in resumed] == [m[name] for m in metrics[3:]]
    assert len({m["lr"] for m in metrics}) == 6 or optim is not DECAY
    assert same_weights(weights(second.policy.model), weights(straight.policy.model))
    assert second.state == straight.state
    if straight.teacher is None:
        assert second.teacher is None
    else:
        assert same_weights(weights(second.teacher.model), weights(straight.teacher.model))


def test_the_final_model_and_an_exported_checkpoint_are_folders_that_transformers_loads(tmp_path):
    trainer = trainer_of()
    trainer.train_step(sequences())
    export_model(save_checkpoint(trainer, tmp_path / "checkpoints"), tmp_path / "exported")
    for folder in (save_model(trainer, tmp_path / "final"), tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert same_weights(weights(model), weights(trainer.policy.model))
        messages = [{"role": "user", "content": "12+34"}]
        assert render_chat(tokenizer, messages) == render_chat(trainer.policy.tokenizer, messages)
        assert (folder / "model.safetensors").exists()


def test_the_newest_checkpoints_stay_and_leftovers_of_a_kill_are_swept(tmp_path):
    trainer = trainer_of()
    assert checkpoints(tmp_path) == []
    (tmp_path / ".tmp-step-00007").mkdir()
    for step in (2, 9, 10):
        trainer.state.step = step
        save_checkpoint(trainer, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00009", "step-00010"]
    assert checkpoints(tmp_path)[0] == tmp_path / "step-00010"


def test_saving_a_checkpoint_again_replaces_it(tmp_path):
    trainer = trainer_of()
    save_checkpoint(trainer, tmp_path)
    with torch.no_grad():
        trainer.policy.model.get_input_embeddings().weight.zero_()
    restored = trainer_of()
    restore(restored, save_checkpoint(trainer, tmp_path))
    assert not restored.policy.model.get_input_embeddings().weight.any()


# --- metrics ---


def test_a_steps_metrics_by_hand():
    base = sequences()[0]

    def made(group: str, reward: float, route: list[int], truncated: bool = False):
        return replace(
            base, group_id=group, reward=reward, correct=reward > 0,
            route=np.array(route, np.uint8),
            token_ids=np.zeros(len(route), np.int64), truncated=truncated,
        )  # fmt: skip

    made_up = [
        made("a", 1.0, [0, 1, 1, 0]),
        made("a", 0.0, [2, 0], truncated=True),
        made("b", 1.0, [0, 0]),
        made("b", 1.0, [0, 0]),
    ]
    sums = Counter(
        tokens=10, entropy=5.0, ratio_clipped=2.0, drift=1.0, drift_kl=0.5,
        fkl_tokens=2, fkl_kl=0.5, rkl_tokens=1, rkl_kl=0.25, kl_clipped=1,
    )  # fmt: skip
    assert step_metrics(made_up, sums, 0.7) == {
        "reward": 0.75, "pass_rate": 0.75, "pass_rate_se": 0.25, "groups_without_signal": 0.5,
        "response_tokens": 2.5, "truncated": 0.25, "looping": 0.0, "coverage_fkl": 0.2,
        "coverage_rkl": 0.1, "entropy": 0.5,
        "ratio_clipped": 0.2, "sampler_drift": 0.1, "sampler_drift_max": 0.7, "sampler_kl": 0.05,
        "tokens": 10.0, "kl_fkl": 0.25, "sequences": 4.0, "kl_rkl": 0.25,
        "kl_clipped": pytest.approx(1 / 3),
    }  # fmt: skip


def test_a_step_that_trains_no_token_has_no_means_over_tokens():
    """Groups without signal are left out, or all responses are empty: no data, and not 0."""
    overall = {"sequences", "reward", "pass_rate", "groups_without_signal", "response_tokens"}
    overall |= {"truncated", "looping", "tokens"}
    base = sequences()[0]
    left_out = step_metrics([base], Counter(), 0.0, with_reference=True)
    assert left_out.keys() == overall | {"coverage_fkl", "coverage_rkl"}
    empty = replace(base, route=base.route[:0], token_ids=base.token_ids[:0])
    metrics = step_metrics([empty], Counter(), 0.0)
    assert metrics.keys() == overall
    assert (metrics["tokens"], metrics["response_tokens"]) == (0.0, 0.0)


def test_a_steps_metrics_are_finite_and_agree_with_its_table():
    metrics = trainer_of().train_step(sequences())
    assert all(math.isfinite(value) for value in metrics.values())
    routes = np.concatenate([s.route for s in sequences()])
    assert metrics["coverage_fkl"] == pytest.approx((routes == Route.FKL).mean())
    assert metrics["coverage_rkl"] == pytest.approx((routes == Route.RKL).mean())
    assert 0 < metrics["coverage_fkl"] + metrics["coverage_rkl"] <= 0.25
    assert metrics["tokens"] == len(routes)
    assert metrics["pass_rate"] == np.mean([s.reward for s in sequences()])


def test_a_policy_is_left_as_it_was_by_a_copys_training():
    policy = fresh_policy()
    before = weights(policy.model)
    trainer_of(replace(policy, model=copy.deepcopy(policy.model))).train_step(sequences())
    assert same_weights(weights(policy.model), before)
