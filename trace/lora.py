"""Low-rank adapters by peft: added to a policy (policy.py), saved, restored and merged
(checkpoint.py).

A checkpoint holds only the adapters, because the base's weights never change. The final model is
saved with merged weights, which any reader of transformers folders loads, and next to them
`adapter/`, which peft loads.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..schemas.configs import LoraConfig
from ..schemas.errors import InputError
from .ranks import whole_tensor

_ADAPTER = "default"
_BASE_PREFIX = "base_model.model."


def add_adapters(model: Any, config: LoraConfig) -> Any:
    """Freeze a transformers model and put trainable float32 adapters on it: a peft.PeftModel.

    Initial values are the same in every run and on every rank. They change no output before the
    first step (B is 0).

    Raises:
        InputError: peft is not installed, or target_modules names no linear layer, another kind of
            layer, or the head.
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=True)
        except ValueError as error:
            raise InputError(
                f"lora.target_modules {config.target_modules}: {str(error).splitlines()[0]:.160}; "
                "name linear layers of the policy, or use all-linear"
            ) from None
    head = adapted.get_output_embeddings()
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if layer is head or not isinstance(layer.base_layer, torch.nn.Linear):
            what = "the head" if layer is head else "no linear layer"
            raise InputError(
                f"lora.target_modules: {name.removeprefix(_BASE_PREFIX)} is {what}; name linear "
                "layers other than the head, or use all-linear"
            )
    return adapted


def has_adapters(model: Any) -> bool:
    """Whether `add_adapters` made this model."""
    return hasattr(model, "peft_config")


def transformers_model(model: Any) -> Any:
    """The transformers model inside a peft model, with its adapters; a plain model unchanged."""
    return model.get_base_model() if has_adapters(model) else model


def gathered_adapters(model: Any) -> dict[str, torch.Tensor]:
    """All adapters of a model by its own names, whole, on the CPU; every rank has to call."""
    state = model.state_dict()
    return {name: whole_tensor(state[name]).cpu() for name in state if ".lora_" in name}


def save_adapters(
    model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors for peft.PeftModel.from_pretrained.

    weights: from `gathered_adapters`; needed if the model is sharded.
    """
    model.save_pretrained(
        folder, state_dict=weights, selected_adapters=[_ADAPTER], save_embedding_layers=False
    )


def load_adapters(model: Any, folder: Path) -> Any:
    """Put the adapters that `save_adapters` wrote on their base: a peft.PeftModel.

    Raises:
        InputError: peft is not installed, or they do not fit the base.
    """
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}: its adapters do not fit {model.name_or_path} ({reason:.160}); name the "
            "model that they were trained on"
        ) from None


@torch.no_grad()
def plain_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's state dict as the plain model's, one whole tensor at a time: W + (alpha / rank) B A
    where there are adapters.

    Summed in float32 and rounded once to W's type. Tied weights have each of their names. If the
    model is sharded, every rank has to iterate to the end.
    Source: LoRA (arXiv 2106.09685, section 4.1).
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        weight = whole_tensor(tensor)
        module, base, leaf = name.rpartition(".base_layer.")
        if base and leaf == "weight":
            down = whole_tensor(state[f"{module}.lora_A.{_ADAPTER}.weight"]).float()  # (rank, in)
            up = whole_tensor(state[f"{module}.lora_B.{_ADAPTER}.weight"]).float()  # (out, rank)
            settings = model.peft_config[_ADAPTER]
            update = settings.lora_alpha / settings.r * (up @ down)
            weight = (weight.float() + update).to(weight.dtype)
        plain_name = f"{module}.{leaf}" if base else name
        yield plain_name.removeprefix(_BASE_PREFIX), weight


def adapter_weights(model: Any) -> dict[str, torch.Tensor] | None:
    """The trained adapters as peft saves them, whole, on the CPU; None without adapters.

    If the model is sharded, every rank has to call.
    """
    if not has_adapters(model):
        return None
    state = _peft().get_peft_model_state_dict(
        model, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    return {name: whole_tensor(tensor).cpu() for name, tensor in state.items()}


def _peft() -> Any:
    if find_spec("peft") is None:
        raise InputError("lora: peft is not installed; `pip install peft`, or leave lora out")
    return import_module("peft")
