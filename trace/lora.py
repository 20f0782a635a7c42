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
from safetensors.torch import load_file

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


def save_adapters(
    model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors for peft.PeftModel.from_pretrained.

    weights: the model's gathered state dict; needed if its parameters are sharded.
    """
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)


def read_adapters(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The adapters that `save_adapters` wrote for a model from `add_adapters`.

    Raises:
        InputError: they cannot be read, or have another shape.
    """
    file = folder / "adapter_model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: is no complete safetensors file ({error}); take another checkpoint"
        ) from None
    expected = adapter_weights(model) or {}
    for name in sorted(expected.keys() | weights.keys()):
        if name in expected and name in weights and expected[name].shape == weights[name].shape:
            continue
        raise InputError(
            f"{folder}: holds adapters of another shape ({name}); resume with the lora settings "
            "that "
            "made it"
        )
    return weights


def set_adapters(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load adapters from `read_adapters` into a model, bit for bit."""
    _peft().set_peft_model_state_dict(model, weights)


def save_merged(
    model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the merged model as a transformers folder, and the adapters in its `adapter/`.

    weights: as in `save_adapters`.
    """
    plain = transformers_model(model)
    merged = {name: weight.cpu() for name, weight in plain_weights(model, weights)}
    for tied in plain.all_tied_weights_keys:
        merged.pop(tied, None)
    plain.save_pretrained(folder, state_dict=merged)
    save_adapters(model, folder / "adapter", weights)


@torch.no_grad()
def plain_weights(
    model: Any, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's state dict as the plain model's, one whole tensor at a time: W + (alpha / rank) B A
    where there are adapters.

    Summed in float32 and rounded once to W's type. Tied weights have each of their names. If the
    model is sharded, every rank has to iterate to the end. state: its state dict, if it is gathered
    already.
    Source: LoRA (arXiv 2106.09685, section 4.1).
    """
    state = model.state_dict() if state is None else state
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
