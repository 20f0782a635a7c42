"""The trainer's weights for vLLM: tensors by name, or written as the model's own files.

vllm.py and vllm_servers.py pass them to their engines.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...trace.lora import has_adapters, merged_weights
from ...trace.policy import Policy


def policy_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights by name: the trained tensors, or with adapters the merged ones on the CPU.

    Tied weights have each of their names: on CPU vLLM's output head is a copy of the embedding in
    another layout, renewed only when the head's own name is loaded.
    """
    model = policy.model
    weights = model.state_dict()
    if has_adapters(model):
        (settings,) = model.peft_config.values()
        weights = merged_weights(weights, settings)
    return weights


def write_weights(policy: Policy, folder: Path) -> None:
    """Write the weights, in the precision that the policy computes in, as `folder`'s safetensors.

    The folder appears atomically.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".weights-", dir=folder.parent))
    weights = {  # copies: safetensors refuses tensors that share memory, as tied weights do
        name: tensor.detach().to("cpu", policy.compute_dtype, copy=True).contiguous()
        for name, tensor in policy_weights(policy).items()
    }
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.chmod(0o755)  # mkdtemp gives no access to others, such as a server's user
    unfinished.rename(folder)


def bytes_of(policy: Policy) -> int:
    """The size of what `write_weights` writes."""
    size = policy.compute_dtype.itemsize
    return sum(tensor.numel() for tensor in policy_weights(policy).values()) * size


def memory_folder(needed: int) -> Path:
    """A new folder in shared memory, or on disk if that is too full. needed: bytes."""
    shared = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own there
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2 * needed
    return Path(tempfile.mkdtemp(prefix="trace-opd-", dir=shared if roomy else None))
