"""Check that packed rows give an architecture's own logits.

trainer.py calls `check_architecture` once per training, before any weights are sharded. The check
runs on the CPU, on a small random model of the policy's architecture.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ..schemas.errors import InputError
from .packing import response_logits

# Sizes of the small model by name of the config's field; smaller ones stay.
_VOCABULARY = 64
_SIZES = {
    "vocab_size": _VOCABULARY, "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size": 64, "embedding_size": 64, "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64,
    "intermediate_size_mlp": 64, "dense_intermediate_size": 64, "shared_intermediate_size": 64,
    "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    "kv_channels": 16, "rotary_dim": 8, "query_pre_attn_scalar": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "zero_expert_num": 2, "first_k_dense_replace": 1,
    "final_logit_softcapping": 5,
}  # fmt: skip
# Windows, chunks and numbers of attended tokens: a short row has to exceed them.
_WINDOW = re.compile(r"window|chunk_size|block_size|local_attention|index_topk")
_NO_WINDOW = ("max_window_layers", "use_sliding_window", "chunk_size_feed_forward")
_WINDOW_SIZE = 4
# Rows are longer than both, unless positions are rows of a table.
_MAX_POSITIONS, _ORIGINAL_POSITIONS = 32, 8
_MOST_PARAMETERS = 200_000_000
_LAYER_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
# Kernels and orders of sums differ by 1e-6, in deep recursion by 1e-3; a window by over 0.05.
_TOLERANCE = 5e-3


def check_architecture(config: Any, trust_remote_code: bool = False) -> None:
    """Check that packed rows give the logits that a model computes for each sequence alone.

    Some architectures mix tokens outside their attention, have another attention, or scale their
    logits after the head. Without this check training would silently use other logits than the
    sampler.

    config: the policy's transformers config. trust_remote_code: as in loading.py.

    Raises:
        InputError: the logits differ, or no small model can be made.
    """
    policy = f"policy {config.model_type}"
    # Of transformers' kernels only the eager one applies it; inference engines do.
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise InputError(
            f"{policy}: the trainer does not know a soft cap in the attention "
            "(attn_logit_softcapping); use another policy"
        )
    try:
        model = small_model(config, trust_remote_code)
        prompts, responses = _rows(model.get_input_embeddings().num_embeddings)
        expected = own_logits(model, prompts, responses)
    except Exception as error:  # an unknown architecture's code may raise anything
        raise InputError(
            f"{policy}: the trainer cannot check this architecture, because no small model of it "
            f"runs ({_reason(error)}); use another policy"
        ) from error
    try:
        with torch.no_grad():
            packed = response_logits(model, prompts, responses)
        difference = float((packed - expected).norm() / expected.norm())
        reason = f"its logits differ by {difference:.2g} of their norm"
    except Exception as error:
        difference, reason = float("inf"), _reason(error)
    if not difference <= _TOLERANCE:
        raise InputError(
            f"{policy}: the trainer does not know this architecture's attention, or what it does "
            f"to its logits after the head ({reason}); use another policy"
        )


def small_model(config: Any, trust_remote_code: bool = False, seed: int = 0) -> Any:
    """A small random model of a config's architecture: float32, on the CPU, eager attention.

    Weights are so large that a window, a scale or a soft cap changes the logits by far more than
    kernels do.

    Raises:
        ValueError: it would be large, because its sizes have other names than those known here.
    """
    small = small_config(config)

    def make() -> Any:
        return AutoModelForCausalLM.from_config(
            small,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        ).eval()

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make().parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"it would have {parameters:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(0.5, 0.3)
        model.get_output_embeddings().weight.mul_(10)
    return model


def small_config(config: Any) -> Any:
    """A config of the same architecture with small sizes and at least one layer of each kind."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    text = config.get_text_config()
    for name in config.sub_configs:
        part = fields.get(name)
        if isinstance(part, dict) and getattr(config, name) is not text:
            _few_layers(part)
    own = next((n for n in config.sub_configs if getattr(config, n, None) is text), None)
    _shrink(fields if own is None else fields[own], text)
    small = type(config).from_dict(fields)
    small.name_or_path = config.name_or_path  # where code of its own lies
    return small


def own_logits(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[np.ndarray]
) -> torch.Tensor:
    """Logits that predict response tokens, each sequence in a pass of its own: (tokens, vocab).

    Raises:
        ValueError: they are not finite.
    """
    logits: dict[int, torch.Tensor] = {}
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    # From the shortest on: dynamic rotary frequencies depend on the longest sequence before.
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        ids = torch.tensor([[*prompts[index], *responses[index].tolist()]])
        with torch.no_grad():
            own = model(input_ids=ids, use_cache=False).logits[0]
        logits[index] = own[len(prompts[index]) - 1 : -1]
    joined = torch.cat([logits[index] for index in range(len(lengths))])
    if not joined.isfinite().all():
        raise ValueError("its logits are not finite")
    return joined


def _rows(vocabulary: int = _VOCABULARY) -> tuple[list[list[int]], list[np.ndarray]]:
    """Prompts and responses shorter and longer than windows and thresholds; some share a prompt."""
    rng = np.random.default_rng(0)
    shared, own, long = (rng.integers(3, vocabulary, n).tolist() for n in (3, 2, 11))
    lengths = [(shared, 2), (shared, 14), (shared, 3), (own, 5), (long, 1), (long, 15)]
    responses = [rng.integers(3, vocabulary, length) for _, length in lengths]
    return [prompt for prompt, _ in lengths], responses


def _shrink(fields: dict[str, Any], config: Any) -> None:
    """Shrink a text model's config, given as a dictionary, in place."""
    aliases = getattr(config, "attribute_map", {})
    heads, keys = (
        fields.get(aliases.get(name, name))
        for name in ("num_attention_heads", "num_key_value_heads")
    )
    _keep_kinds_of_layers(fields, aliases.get("num_hidden_layers", "num_hidden_layers"))
    sizes = {aliases.get(name, name): size for name, size in _SIZES.items()}
    overridden = fields.get("per_layer_config") or {}
    for part in (fields, *overridden.values()):
        for name, value in part.items():
            size = _size(name, sizes)
            if size is not None:
                part[name] = _at_most(value, size)
            elif name.endswith("token_id"):
                part[name] = _token(value)
    if heads is not None and keys == heads:
        fields[aliases.get("num_key_value_heads", "num_key_value_heads")] = min(heads, 4)
    _lower_thresholds(fields, aliases)


def _size(name: str, sizes: dict[str, int]) -> int | None:
    if name in sizes:
        return sizes[name]
    return _WINDOW_SIZE if _WINDOW.search(name) and name not in _NO_WINDOW else None


def _at_most(value: Any, size: int) -> Any:
    if isinstance(value, list):
        return [_at_most(one, size) for one in value]
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return type(value)(size) if whole and value > size else value


def _token(value: Any) -> Any:
    """A token id within the small vocabulary."""
    if isinstance(value, list):
        return [_token(one) for one in value]
    return value % _VOCABULARY if isinstance(value, int) else value


def _few_layers(fields: dict[str, Any]) -> None:
    """One layer for a part that reads no text, for example an image encoder."""
    for name in ("num_hidden_layers", "num_layers", "depth", "num_blocks"):
        if isinstance(fields.get(name), int):
            fields[name] = 1


def _keep_kinds_of_layers(fields: dict[str, Any], name: str) -> None:
    """Keep the first layer of each kind that the config's lists tell, at least two layers."""
    count = fields.get(name)
    if not isinstance(count, int):
        return
    lists = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and len(v) == count}
    indices = {
        n: v for n in _LAYER_LISTS if isinstance(v := fields.get(n), list) and n not in lists
    }
    overridden = {int(n): v for n, v in (fields.get("per_layer_config") or {}).items()}
    first_shared = count - (fields.get("num_kv_shared_layers") or 0)
    first: dict[str, int] = {}
    for layer in range(count):
        kind = [values[layer] for values in lists.values()]
        kind += [layer in values for values in indices.values()]
        first.setdefault(repr([kind, overridden.get(layer), layer >= first_shared]), layer)
    others = [layer for layer in range(count) if layer not in first.values()]
    kept = sorted([*first.values(), *others[: max(0, 2 - len(first))]])
    for n, values in lists.items():
        fields[n] = [values[layer] for layer in kept]
    for n, values in indices.items():
        fields[n] = [new for new, old in enumerate(kept) if old in values]
    if overridden:
        fields["per_layer_config"] = {
            new: dict(overridden[old]) for new, old in enumerate(kept) if old in overridden
        }
    if "num_kv_shared_layers" in fields:
        fields["num_kv_shared_layers"] = sum(layer >= first_shared for layer in kept)
    fields[name] = len(kept)


def _lower_thresholds(fields: dict[str, Any], aliases: dict[str, str]) -> None:
    """Lower the positions at which rotary embeddings change their frequencies."""
    name = aliases.get("max_position_embeddings", "max_position_embeddings")
    rope = fields.get("rope_parameters") or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    most = _MAX_POSITIONS
    if any(part.get("rope_type") == "dynamic" for part in parts):
        most = _ORIGINAL_POSITIONS
    if isinstance(fields.get(name), int):
        fields[name] = min(fields[name], most)
    for part in (fields, *parts):
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = _ORIGINAL_POSITIONS
    for part in parts:
        for factors in {"short_factor", "long_factor"} & part.keys():
            head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
            rotated = int(head * (part.get("partial_rotary_factor") or 1.0))
            # Spread over the list: its first factors are about 1.
            at = np.linspace(0, len(part[factors]) - 1, rotated // 2).astype(int)
            part[factors] = [part[factors][i] for i in at]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
