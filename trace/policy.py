"""The policy: a causal language model, its tokenizer and its identity.

Stages and samplers call `load_policy`; trainer.py and packing.py use its backbone and head.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..schemas.configs import Device, LoraConfig, Precision
from ..schemas.errors import InputError
from .identity import model_revision
from .loading import load_config, load_model, load_tokenizer, require_finite
from .lora import add_adapters, transformers_model
from .protocols import PolicyInfo
from .ranks import Ranks

CPU = torch.device("cpu")


@dataclass
class Policy:
    """A model, its tokenizer and identity, and the precision and device that it computes in.

    model: ready to run, or, for a trainer that shards it, still on the CPU or without weights.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    info: PolicyInfo
    compute_dtype: torch.dtype = torch.float32
    device: torch.device = CPU


def load_policy(
    path: str,
    device: Device = "auto",
    precision: Precision = "auto",
    trainable: bool = False,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool | int = False,
    trust_remote_code: bool = False,
    ranks: Ranks | None = None,
) -> Policy:
    """Load a policy from a folder.

    trainable: for a Trainer of these `ranks`, which keeps what it trains in float32 and computes in
    the chosen precision. bfloat16 weights would lose most updates, which at a learning rate of 1e-6
    are below their resolution. If it shards them (`Ranks.shards`), the first rank's model is on the
    CPU in the type of its files, and the others' on meta.
    lora: freeze the weights, in the chosen precision, and train float32 adapters (lora.py).
    gradient_checkpointing: recompute activations in the backward pass, in all layers or in that
    many. trust_remote_code: run the model's own code. Weights are read from safetensors only.

    Raises:
        InputError: a model that is missing, damaged, incomplete, not finite, or needs its own code;
            no CUDA device; no peft; no layers for adapters or gradient checkpoints.
    """
    where = choose_device(device)
    dtype = choose_dtype(precision, where)
    tokenizer = load_tokenizer(path, trust_remote_code)
    ranks = ranks or Ranks()
    sharded = trainable and ranks.shards(dtype)
    stored: torch.dtype | str = dtype
    if trainable and lora is None:
        stored = "auto" if sharded else torch.float32
    if sharded and not ranks.first:
        model = load_model(path, stored, trust_remote_code, device_map="meta")
    else:
        model = load_model(path, stored, trust_remote_code)
        require_finite(model, path)
    if lora is not None:
        model = add_adapters(model, lora)
    if gradient_checkpointing:
        checkpoint_layers(model, None if gradient_checkpointing is True else gradient_checkpointing)
    if not sharded:
        model.to(where)
    info = policy_info(path, tokenizer, trust_remote_code)
    return Policy(model.eval(), tokenizer, info, dtype, where)


def backbone(model: Any) -> torch.nn.Module:
    """The decoder from token ids to hidden states, of a transformers model or its peft wrapper."""
    return transformers_model(model).base_model


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a model's decoder, in their order.

    Raises:
        InputError: it has no list of layers.
    """
    lists = [m for m in backbone(model).children() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        kind = transformers_model(model).config.model_type
        raise InputError(f"policy {kind}: its decoder has no list of layers; use another policy")
    return list(max(lists, key=len))


def output_head(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (vocab, hidden) and bias (vocab,) or None of the language-model head."""
    head = transformers_model(model).get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def checkpoint_layers(model: Any, count: int | None = None) -> None:
    """Recompute activations of the first `count` layers in the backward pass instead of storing
    them; None: of all layers.

    The first, because the backward pass reaches them last: by then the other layers' activations
    are freed, and those of the layer that is recomputed have room.

    Raises:
        InputError: transformers cannot checkpoint this architecture's layers, or there are fewer.
    """
    plain, decoder = transformers_model(model), backbone(model)
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"policy {plain.config.model_type}: transformers does not checkpoint this "
            "architecture; "
            "set gradient_checkpointing=false"
        )
    if count is not None and count > len(layers):
        raise InputError(
            f"gradient_checkpointing: is {count}, and the policy has {len(layers)} layers; set "
            f"at most {len(layers)}, or true"
        )
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers[count:] if count is not None else []:
        layer.gradient_checkpointing = False
    decoder.register_forward_pre_hook(_follow_grad_mode)


def _follow_grad_mode(decoder: torch.nn.Module, _: Any) -> None:
    """Put checkpointed layers in training mode exactly while gradients are enabled.

    transformers checkpoints a layer only in training mode, and then disables its key-value cache.
    The policy is in evaluation mode (no dropout) and samples with a cache. So only the flags of the
    layers themselves change, not those of their submodules.
    """
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = torch.is_grad_enabled()


def choose_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no CUDA device; set policy.device=cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def policy_info(
    path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PolicyInfo:
    """Name, identity and vocabulary fingerprint of the model in a folder."""
    revision = model_revision(path, trust_remote_code)
    return PolicyInfo(policy_name(path), revision, 0, vocab_fingerprint(tokenizer))


def policy_name(path: str) -> str:
    """The folder's name; for a snapshot in the hub's cache (models--owner--name) the model's
    name.
    """
    folder = Path(path)
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def vocab_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary's tokens and ids."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocab.encode()).hexdigest()[:16]


def vocab_size(path: str, trust_remote_code: bool = False) -> int:
    """Number of token ids of the model at a path: the tokenizer's plus padding.

    Raises:
        InputError: there is no model config.
    """
    return load_config(path, trust_remote_code).get_text_config().vocab_size


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a response."""
    ends = model.generation_config.eos_token_id
    candidates: list[Any] = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return sorted({token for token in candidates if token is not None})
