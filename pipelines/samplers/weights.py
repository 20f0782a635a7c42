"""The trainer's weights or adapters as files that vLLM loads.

vllm.py and vllm_servers.py write them for engines in other processes.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...schemas.configs import OpenAISampler, Sampler, VllmSampler
from ...schemas.errors import InputError
from ...trace.lora import AdapterForm, has_adapters
from ...trace.protocols import TrainedPolicy

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.32's choices of max_lora_rank
_FILE_BYTES = 2**30  # of a safetensors file, which is in memory as a whole while it is written


def write_weights(policy: TrainedPolicy, folder: Path, file_bytes: int = _FILE_BYTES) -> None:
    """Write the weights as safetensors files of about `file_bytes` each.

    The folder appears atomically.
    """
    with _appearing(folder) as unfinished:
        for number, part in enumerate(_parts(policy.weights(), file_bytes)):
            save_file(part, unfinished / f"model-{number:05d}.safetensors", {"format": "pt"})


def write_adapters(policy: TrainedPolicy, form: AdapterForm, folder: Path) -> None:
    """Write the adapters as peft's files, in the compute type, to which vLLM would round them.

    The folder appears atomically.
    """
    tensors = policy.adapters()
    assert tensors is not None, "the policy has adapters"
    settings = {
        "peft_type": "LORA",
        "r": form.rank,
        "lora_alpha": form.alpha,
        "target_modules": list(form.modules),
    }
    with _appearing(folder) as unfinished:
        rounded = {n: t.to("cpu", policy.compute_dtype).contiguous() for n, t in tensors.items()}
        save_file(rounded, unfinished / "adapter_model.safetensors", {"format": "pt"})
        (unfinished / "adapter_config.json").write_text(json.dumps(settings))


def hands_adapters(config: Sampler, model: Any) -> bool:
    """Whether an engine gets the adapters alone of the model that is trained."""
    loads = isinstance(config, OpenAISampler | VllmSampler) and config.adapters == "load"
    return loads and has_adapters(model)


def engine_rank(form: AdapterForm) -> int:
    """vLLM's smallest limit (max_lora_rank) that the adapters' rank keeps.

    Raises:
        InputError: their rank is above the largest.
    """
    for rank in ENGINE_RANKS:
        if form.rank <= rank:
            return rank
    raise InputError(
        f"lora.rank: is {form.rank}, vLLM loads adapters of rank {ENGINE_RANKS[-1]} at most; set "
        "sampler.adapters=merge, or a smaller rank"
    )


def take_part(policy: TrainedPolicy, adapters: bool) -> None:
    """Help gather what other ranks hand over, on a rank that has no engine to give it to.

    adapters: they are handed over alone.
    """
    if adapters:
        policy.adapters()
        return
    for _ in policy.weights():
        pass


def weights_bytes(model: str, dtype: torch.dtype) -> int:
    """About the bytes of a model's weights in a type, by its own files, of two bytes a weight."""
    stored = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    return stored * dtype.itemsize // 2


def memory_folder(needed: int) -> Path:
    """A new folder in shared memory, or on disk if that is too full. needed: bytes."""
    shared = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own there
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2 * needed
    return Path(tempfile.mkdtemp(prefix="trace-opd-", dir=shared if roomy else None))


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".weights-", dir=folder.parent))
    yield unfinished
    unfinished.chmod(0o755)  # mkdtemp gives no access to others, such as a server's user
    unfinished.rename(folder)


def _parts(
    tensors: Iterator[tuple[str, torch.Tensor]], file_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(copied.nbytes for copied in part.values()) >= file_bytes:
            yield part
            part = {}
    if part:
        yield part
