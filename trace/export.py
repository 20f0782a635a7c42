"""A transformers model folder from a checkpoint of a training.

The command `trace-opd export` calls it. A checkpoint holds float32 weights in shards, or adapters
alone. No more than one model is in memory: weights of a full training are read, converted and
written file by file; adapters are merged into their base.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..schemas.errors import InputError
from .checkpoint import ADAPTER
from .folders import FAILURES, write_folder
from .identity import TRAINER_FILE, model_revision
from .loading import load_config, load_model, load_tokenizer, model_on_meta
from .lora import load_adapters, plain_weights
from .model_folder import write_settings, write_weights
from .retention import difference, require_this_format
from .saved_run import MODEL, SHARDS
from .shards import Described, described, in_files, read_shards

_READ_BYTES = 1 << 30


def export_model(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint's policy as a transformers folder, atomically; adapters are merged into
    their base, and stand in `adapter/` too.

    base: folder of the model under the adapters; None: the one that they were trained on.

    Raises:
        InputError: the checkpoint is damaged, the base is another model, the folder cannot be
            written or is there.
    """
    _check(checkpoint, folder)
    adapters = checkpoint / ADAPTER
    tokenizer = load_tokenizer(str(checkpoint), trust_remote_code)
    if adapters.is_dir():
        path = base or _base_of(adapters)
        _require_base(checkpoint, path, trust_remote_code)
        # Sums are rounded once: to the base's type, so that is no lower than the asked one.
        loaded = torch.float32 if dtype == torch.float32 else "auto"
        model = load_adapters(load_model(path, loaded, trust_remote_code), adapters)
        weights = plain_weights(model)
    elif base is not None:
        raise InputError(f"{checkpoint}: has no adapters; leave --base out")
    else:
        model = model_on_meta(load_config(str(checkpoint), trust_remote_code), trust_remote_code)
        weights = _stored_weights(checkpoint, model)

    def write(temporary: Path) -> None:
        write_settings(model, tokenizer, temporary)
        write_weights(model, weights, temporary, dtype)
        if adapters.is_dir():
            shutil.copytree(adapters, temporary / ADAPTER)

    write_folder(folder, write)


def export_adapters(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's adapters and the tokenizer as peft and vLLM load them, atomically.

    Raises:
        InputError: as `export_model`, or the checkpoint has no adapters.
    """
    _check(checkpoint, folder)
    adapters = checkpoint / ADAPTER
    if not adapters.is_dir():
        raise InputError(f"{checkpoint}: has no adapters; leave --adapters out")
    tokenizer = load_tokenizer(str(checkpoint))

    def write(temporary: Path) -> None:
        shutil.copytree(adapters, temporary, dirs_exist_ok=True)
        tokenizer.save_pretrained(temporary)

    write_folder(folder, write)


def _check(checkpoint: Path, folder: Path) -> None:
    require_this_format(checkpoint)
    if (reason := difference(checkpoint)) is not None:
        raise InputError(f"{checkpoint}: is damaged ({reason}); export another step")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; name a new folder")


def _base_of(adapters: Path) -> str:
    recorded = json.loads((adapters / "adapter_config.json").read_bytes())
    path = str(recorded.get("base_model_name_or_path"))
    if not Path(path).is_dir():
        raise InputError(
            f"{adapters}: the model that it was trained on is not at {path}; name its folder or "
            "hub id with --base"
        )
    return path


def _require_base(checkpoint: Path, path: str, trust_remote_code: bool) -> None:
    expected = json.loads((checkpoint / TRAINER_FILE).read_bytes())["base"]
    if model_revision(path, trust_remote_code) != expected:
        raise InputError(
            f"{path}: is another model than {checkpoint} was trained on, or has changed since; "
            "name the unchanged one with --base"
        )


def _stored_weights(checkpoint: Path, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The student's whole tensors by name, in the order of the model's layers."""
    shards = checkpoint / SHARDS
    try:
        stored = described(shards)
        order = [name for name in model.state_dict() if MODEL + name in stored]
        sizes = {name: _bytes(stored[MODEL + name]) for name in order}
        files = in_files(sizes, _READ_BYTES)
        for number in sorted(set(files.values())):
            names = [MODEL + name for name in order if files[name] == number]
            read = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype)
                    for name in names}  # fmt: skip
            read_shards(read, shards)
            for name in names:
                yield name.removeprefix(MODEL), read.pop(name)
    except (*FAILURES, ValueError) as error:
        raise InputError(f"{shards}: cannot be read ({error}); export another step") from None


def _bytes(one: Described) -> int:
    return one.shape.numel() * one.dtype.itemsize
