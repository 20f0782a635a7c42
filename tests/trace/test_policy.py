"""Precision of the weights and of the computation, and what the trainer refuses."""

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.batch import check_head
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trainer import Trainer


def test_a_trained_policy_keeps_float32_weights_and_computes_in_bfloat16():
    policy = load_policy(resolve_policy("micro"), "cpu", "bfloat16", trainable=True)
    assert policy.model.dtype == torch.float32
    with policy.autocast():
        assert policy.model(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16


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
    with pytest.raises(InputError, match="changes its logits behind the head"):
        check_head(GraniteForCausalLM(config))


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
