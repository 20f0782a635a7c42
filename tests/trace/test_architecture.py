"""The check of an architecture; every_architecture.py checks all of transformers'."""

from typing import Any

import pytest
from transformers import (
    CONFIG_MAPPING,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace import attention, packing
from trace_opd.trace.architecture import check_architecture, small_config, small_model
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trainer import Trainer

# Qwen3-8B's config.json.
QWEN3_8B = Qwen3Config(
    vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
    bos_token_id=151_643, eos_token_id=151_645,
)  # fmt: skip
WINDOWS: dict[str, Any] = {
    "use_sliding_window": True, "sliding_window": 4096, "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
# Phi-4-mini's: a longer context by other factors than those of short sequences.
PHI_4_MINI = Phi3Config(
    vocab_size=200_064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
    num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131_072,
    original_max_position_embeddings=4096, sliding_window=262_144, pad_token_id=199_999,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48, "long_factor": [1 + index for index in range(48)],
    },
)  # fmt: skip


def of(name: str, **fields: Any) -> Any:
    return CONFIG_MAPPING[name](**fields)


SUPPORTED = {
    "qwen3": QWEN3_8B,
    "experts, windows in the mask alone": Qwen2MoeConfig(**WINDOWS),
    "longrope": PHI_4_MINI,
    "latent attention": of("deepseek_v3"),
    "keys shared by layers": of("gemma4_text", num_kv_shared_layers=10),
    "a table of positions": of("gpt2"),
    "text within images": of("gemma3"),
}
REFUSED = {
    "a scale of the logits": GraniteConfig(logits_scaling=8.0),
    "attention to sinks": GptOssConfig(),
    "a soft cap in the attention": Gemma2Config(),
    "a mask of its own": of("doge"),
    "tokens attended by an index": of("deepseek_v32"),
    "recurrent layers": of("qwen3_next"),
    "convolutions": of("lfm2", layer_types=["conv", "full_attention"] * 16),
    "no causal attention": of("bert"),
    "state space": of("mamba"),
    "sizes of other names": of("blt"),
}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_supported_architecture_passes(kind):
    check_architecture(SUPPORTED[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_of_another_kind_is_refused_in_one_sentence(kind):
    config = REFUSED[kind]
    with pytest.raises(InputError, match=rf"policy {config.model_type}: ") as error:
        check_architecture(config)
    assert "\n" not in str(error.value)


def test_the_check_sees_a_window_that_packing_ignores(monkeypatch):
    monkeypatch.setattr(attention, "_window", lambda mask: None)
    check_architecture(QWEN3_8B)
    with pytest.raises(InputError, match="differ"):
        check_architecture(SUPPORTED["experts, windows in the mask alone"])


def test_the_check_sees_frequencies_of_another_length(monkeypatch):
    monkeypatch.setattr(packing, "length_ropes", lambda decoder: [])
    with pytest.raises(InputError, match="differ"):
        check_architecture(PHI_4_MINI)


def test_the_small_model_has_each_kind_of_layer_and_few_weights():
    config = of("gemma4_text", num_kv_shared_layers=10, final_logit_softcapping=30.0)
    small = small_config(config)
    assert small.layer_types == ["sliding_attention", "full_attention"] * 2
    assert (small.num_kv_shared_layers, small.sliding_window) == (2, 4)
    assert small.final_logit_softcapping == 5
    assert config.num_hidden_layers == 30  # the policy's own stays
    assert sum(p.numel() for p in small_model(QWEN3_8B).parameters()) < 100_000


def test_the_trainer_refuses_a_policy_that_it_does_not_know():
    policy = load_policy(resolve_policy("micro"), "cpu")
    policy.model.config.final_logit_softcapping, policy.model.config.attn_logit_softcapping = 0, 50
    with pytest.raises(InputError, match="soft cap"):
        Trainer(policy, TrainConfig(offline={"steps": 1}))


@pytest.mark.parametrize(("heads", "keys"), [(2, 2), (3, 1), (6, 6), (16, 8)])
def test_any_number_of_heads_passes(heads, keys):
    config = Qwen3Config(
        vocab_size=128, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=16,
    )  # fmt: skip
    check_architecture(config)
