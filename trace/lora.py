"""Low-rank adapters by peft: added to a policy (policy.py), saved, restored and merged
(checkpoint.py).

A checkpoint holds only the adapters, because the base's weights never change. The final model is
saved with merged weights, which any reader of transformers folders loads, and next to them
`adapter/`, which peft loads.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..schemas.configs import LoraConfig
from ..schemas.errors import InputError
from .ranks import whole_tensor

_ADAPTER = "default"
_TEACHER = "teacher"
_BASE_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterForm:
    """What an engine has to know of a model's adapters: rank, alpha, the linear layers' names."""

    rank: int
    alpha: float
    modules: tuple[str, ...]


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


def add_teacher(model: Any) -> None:
    """Add a second set of adapters, equal to the trained ones and frozen: the teacher's."""
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(_TEACHER, copy.deepcopy(model.peft_config[_ADAPTER]))
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if f".{_TEACHER}." in name:
            parameter.requires_grad_(False)
            parameter.data.copy_(own[name.replace(f".{_TEACHER}.", f".{_ADAPTER}.")])
        elif ".lora_" in name:
            parameter.requires_grad_(True)


class AdapterView:
    """A packed model with one set of its adapters, or without any: no copy of the base.

    Called like the packed model. Its parameters are those of the adapters.
    """

    def __init__(self, packed: Any, adapters: Literal["trained", "teacher", "none"]) -> None:
        """packed: a PackedModel of a model from `add_adapters`; `add_teacher` makes its teacher."""
        self._packed = packed
        self._name = {"trained": _ADAPTER, "teacher": _TEACHER, "none": None}[adapters]

    def __call__(self, *args: Any) -> Any:
        with _computing_with(self._packed.model, self._name):
            return self._packed(*args)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The adapters', by their names in the packed model."""
        for name, parameter in self._packed.named_parameters():
            if ".lora_" in name and f".{self._name}." in name:
                yield name, parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The adapters', in the order of the model's layers."""
        return (parameter for _, parameter in self.named_parameters())


@contextmanager
def _computing_with(model: Any, adapters: str | None) -> Iterator[None]:
    """Within it, the model computes with the adapters of a name; None: without any.

    peft's own switches change which parameters are trained, so the layers' are set alone.
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer._disable_adapters = adapters is None
        layer._active_adapter = [adapters or _ADAPTER]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = False, [_ADAPTER]


def has_adapters(model: Any) -> bool:
    """Whether `add_adapters` made this model."""
    return hasattr(model, "peft_config")


def adapter_form(model: Any) -> AdapterForm | None:
    """The form of a model's adapters; None without."""
    if not has_adapters(model):
        return None
    settings = model.peft_config[_ADAPTER]
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return AdapterForm(settings.r, settings.lora_alpha, tuple(sorted(names)))


def transformers_model(model: Any) -> Any:
    """The transformers model inside a peft model, with its adapters; a plain model unchanged."""
    return model.get_base_model() if has_adapters(model) else model


def save_adapters(
    model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors for peft.PeftModel.from_pretrained.

    weights: the model's gathered state dict; needed if its parameters are sharded.
    """
    model.save_pretrained(
        folder, state_dict=weights, save_embedding_layers=False, selected_adapters=[_ADAPTER]
    )


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
