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
            trained = own[name.replace(f".{_TEACHER}.", f".{_ADAPTER}.")]
            if not trained.is_meta:  # else its values come from the first rank
                parameter.data.copy_(trained)
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


def gathered_adapters(model: Any) -> dict[str, torch.Tensor]:
    """The trained adapters by the model's own names, whole, on the CPU; every rank has to call."""
    state = model.state_dict()
    names = [name for name in state if ".lora_" in name and f".{_ADAPTER}." in name]
    return {name: whole_tensor(state[name]).cpu() for name in names}


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
    """`gathered_adapters` by the names in peft's files; None without adapters."""
    if not has_adapters(model):
        return None
    return _peft().get_peft_model_state_dict(
        model, gathered_adapters(model), adapter_name=_ADAPTER, save_embedding_layers=False
    )


def _peft() -> Any:
    if find_spec("peft") is None:
        raise InputError("lora: peft is not installed; `pip install peft`, or leave lora out")
    return import_module("peft")
