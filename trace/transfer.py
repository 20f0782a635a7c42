"""Tensors from the host to a device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for what a GPU has still to do.

    A copy from memory that is not pinned waits for all work before it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
