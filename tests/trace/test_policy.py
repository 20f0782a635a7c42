"""Precision of weights and computation, and which models the trainer refuses."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.architecture import check_architecture
from trace_opd.trace.packing import pack
from trace_opd.trace.policy import decoder_layers, load_policy
from trace_opd.trace.policy_losses import reference_kl
from trace_opd.trace.sequences import TrainingSequence
from trace_opd.trace.trainer import Trainer


def test_a_trained_policy_keeps_float32_weights_and_computes_in_bfloat16():
    policy = load_policy(resolve_policy("micro"), "cpu", "bfloat16", trainable=True)
    config = TrainConfig.model_validate({"offline": {"steps": 1}, "loss": {"reference_kl": 0.1}})
    trainer = Trainer(policy, config)
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    for frozen in (trainer.teacher, trainer.reference):
        assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in frozen.parameters())
    row = pack([[5, 6]], [np.array([7, 8])])
    seen = trainer.student(row, lambda states, head: (states.dtype, head.weight.dtype))
    assert seen == (torch.bfloat16, torch.bfloat16)


def test_an_averaged_teacher_is_kept_in_float32():
    policy = load_policy(resolve_policy("micro"), "cpu", "bfloat16", trainable=True)
    config = {"offline": {"steps": 1}, "teacher": {"sync": "ema"}}
    teacher = Trainer(policy, TrainConfig.model_validate(config)).teacher
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_a_sampling_policy_is_kept_in_its_precision():
    assert load_policy(resolve_policy("micro"), "cpu", "bfloat16").model.dtype == torch.bfloat16


def test_logits_scaled_behind_the_head_are_refused():
    config = GraniteConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=8.0,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    with pytest.raises(InputError, match="what it does to its logits after the head"):
        check_architecture(config)


def test_a_step_without_sequences_changes_no_weight_and_reports_no_means():
    policy = load_policy(resolve_policy("micro"), "cpu", trainable=True)
    config = TrainConfig.model_validate({"offline": {"steps": 2}})
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    metrics = Trainer(policy, config).train_step([])
    assert metrics["sequences"] == 0
    assert "reward" not in metrics
    assert not any(np.isnan(value) for value in metrics.values())
    after = policy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reference_kl_is_0_at_the_base_and_by_hand_elsewhere():
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    kl = reference_kl(logprobs, reference)
    expected = [0.0, np.exp(-1.0) + 1.0 - 1.0, np.exp(0.5) - 0.5 - 1.0]
    assert kl.tolist() == pytest.approx(expected)
    kl.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1 - np.exp(-1.0), 1 - np.exp(0.5)])


def test_a_reference_kl_keeps_the_student_near_its_base():
    def drift(weight: float) -> float:
        policy = load_policy(resolve_policy("micro"), "cpu", trainable=True)
        loss = {"reference_kl": weight}
        settings = {"offline": {"steps": 6}, "schedule": {"w0": 0.0}, "optim": {"lr": 1e-3}}
        trainer = Trainer(policy, TrainConfig.model_validate(settings | {"loss": loss}))
        base = load_policy(resolve_policy("micro"), "cpu").model
        ids = torch.tensor([[10, 20, 30, 40, 50]])
        row = TrainingSequence(
            rollout_id="r",
            group_id="g",
            prompt_ids=[10],
            token_ids=np.array([20, 30, 40, 50]),
            logprobs=np.full(4, -5.0, np.float32),
            route=np.zeros(4, np.uint8),
            advantage=1.0,
            reward=1.0,
            correct=True,
            temperature=1.0,
            truncated=False,
            teacher_prompt_ids=None,
        )
        metrics = [trainer.train_step([row]) for _ in range(6)]
        if weight:
            assert metrics[0]["kl_reference"] == pytest.approx(0.0, abs=1e-6)
            assert metrics[-1]["kl_reference"] > 0
        with torch.no_grad():
            moved = policy.model(ids).logits.log_softmax(-1) - base(ids).logits.log_softmax(-1)
        return moved.abs().mean().item()

    assert drift(50.0) < 0.7 * drift(0.0)


def test_layers_are_found_under_any_name():
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    assert len(decoder_layers(GPT2LMHeadModel(config))) == 3
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    assert len(decoder_layers(LlamaForCausalLM(config))) == 2
