"""A transformers model folder, written tensor by tensor.

checkpoint.py writes the final model with it, export.py that of a checkpoint. Memory holds one file
of weights, so a model of any size can be written.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .lora import transformers_model

_FILE_BYTES = 4 << 30
_LAYER = re.compile(r".*?\.\d+\.")  # a layer's prefix: model.layers.3.

Named = Iterable[tuple[str, torch.Tensor]]


def write_settings(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write everything but the weights: config, generation config, the model's code, tokenizer."""
    transformers_model(model).save_pretrained(folder, state_dict={})
    tokenizer.save_pretrained(folder)


def write_weights(
    model: Any,
    weights: Named,
    folder: Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Write weights, given by the names of the model's state dict, under those of its files.

    The model may be on meta. dtype: of the written floating-point weights; None: as they are.
    Call `write_settings` before.
    """
    plain = transformers_model(model)
    kept = ((name, tensor) for name, tensor in weights if name not in plain.all_tied_weights_keys)
    files: list[dict[str, torch.Size]] = []
    pending: dict[str, torch.Tensor] = {}
    total = filled = 0

    def write() -> None:
        nonlocal pending, filled
        save_file(pending, folder / _temporary(len(files)), metadata={"format": "pt"})
        files.append({name: tensor.shape for name, tensor in pending.items()})
        pending, filled = {}, 0

    for name, tensor in _as_stored(plain, kept):
        of_type = dtype if tensor.is_floating_point() else None
        tensor = tensor.detach().to("cpu", of_type or tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and filled + size > file_bytes:
            write()
        pending[name] = tensor
        filled, total = filled + size, total + size
    write()
    _name_files(folder, files, total)
    if dtype is not None:
        _set_dtype(folder / "config.json", dtype)


def _as_stored(model: Any, weights: Named) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as the model's own files have them: transformers fuses and renames some at loading.

    Reverted layer by layer, because what is fused belongs to one layer.
    """
    group: dict[str, torch.Tensor] = {}
    current: str | None = None
    for name, tensor in weights:
        layer = _LAYER.match(name)
        prefix = layer.group() if layer else None
        if group and (prefix is None or prefix != current):
            yield from revert_weight_conversion(model, group).items()
            group = {}
        group[name], current = tensor, prefix
    if group:
        yield from revert_weight_conversion(model, group).items()


def _name_files(folder: Path, files: list[dict[str, torch.Size]], total: int) -> None:
    """Name the files as transformers does, which needs their number, and write their index."""
    if len(files) == 1:
        (folder / _temporary(0)).rename(folder / SAFE_WEIGHTS_NAME)
        return
    places = {}
    for index, held in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _temporary(index)).rename(folder / name)
        places |= dict.fromkeys(held, name)
    parameters = sum(shape.numel() for held in files for shape in held.values())
    metadata = {"total_parameters": parameters, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _temporary(index: int) -> str:
    return f"part-{index:05d}.safetensors"


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    settings = json.loads(config.read_text("utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
