"""Every causal language model of the installed transformers: supported and right, or refused.

    make test-architectures

Each architecture's default config and variants of it: windows in every second layer, and each rope
type. A config is made small by the code under test, but compared in other rows, with other weights
and with both kernels of transformers. test_architecture.py has a few of each kind.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trace_opd.schemas.errors import InputError
from trace_opd.trace.architecture import check_architecture, own_logits, small_model
from trace_opd.trace.packing import response_logits

# Those whose defaults make no model.
FIELDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
# By their default config; others are refused.
SUPPORTED = {
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "biogpt", "bitnet", "ctrl", "cwm",
    "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "emu3", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "fuyu", "gemma", "gemma3", "gemma3_text",
    "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neox", "granite", "granitemoe", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jetmoe", "laguna",
    "lfm2", "llama", "longcat_flash", "mellum", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "youtu",
}  # fmt: skip
# Factors that change each frequency by another ratio.
RISING = np.linspace(1, 8, 64).tolist()
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "longrope": {
        "short_factor": [1.0] * 64,
        "long_factor": RISING,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def variants(name: str) -> Iterator[tuple[str, Any]]:
    """The default config of an architecture, and variants that its class accepts."""
    given = FIELDS.get(name, {})
    try:
        default = CONFIG_MAPPING[name](**given)
    except Exception:  # made from parts, not from fields
        return
    yield "default", default
    text = default.get_text_config()
    if text is not default:
        return
    fields: list[tuple[str, dict[str, Any]]] = []
    layers = getattr(text, "num_hidden_layers", None) if hasattr(text, "layer_types") else None
    if hasattr(text, "sliding_window") and layers:
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
        window = {"sliding_window": 4096, "use_sliding_window": True}
        fields.append(("windows", window | {"layer_types": kinds}))
    elif hasattr(text, "sliding_window"):
        fields.append(("windows", {"sliding_window": 4096}))
    rope = vars(text).get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "default":
        fields += [
            (kind, {"rope_parameters": rope | {"rope_type": kind} | copy.deepcopy(parameters)})
            for kind, parameters in ROPES.items()
        ]
    for label, changed in fields:
        with suppress(Exception):  # the architecture has no such variant
            yield label, type(default)(**(given | changed))


def rows(seed: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Four prompts of four responses of 1 to 18 tokens each."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 64, rng.integers(1, 12)).tolist() for _ in range(4)]
    return (
        [prompt for prompt in prompts for _ in range(4)],
        [rng.integers(3, 64, rng.integers(1, 18)) for _ in range(16)],
    )


def difference(config: Any, seed: int, attention: str) -> float:
    model = small_model(config, seed=seed)
    prompts, responses = rows(seed)
    try:
        model.set_attn_implementation(attention)
    except ValueError:  # not of this architecture
        return 0.0
    expected = own_logits(model, prompts, responses)
    with torch.no_grad():
        got = response_logits(model, prompts, responses)
    return float((got - expected).norm() / expected.norm())


def refusal(config: Any) -> str | None:
    try:
        check_architecture(config)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_an_architecture_is_right_or_refused_in_one_sentence(name):
    for label, config in variants(name):
        sentence = refusal(config)
        print(f"{name}, {label}: {sentence or 'supported'}")
        if label == "default":
            assert (sentence is None) == (name in SUPPORTED)
        if sentence is not None:
            assert sentence.startswith("policy ")
            assert "\n" not in sentence
            if label == "default":
                return
            continue
        for attention in ("eager", "sdpa"):
            assert difference(config, 1, attention) < 5e-3, (label, attention)
